"""Aligns the projector: maps every image token to the sum of the word embeddings that describe its patch.

The language model can read such tokens as text before any training on images. LLaVA aligns its projector on captions
for the same reason; words for every patch take only minutes on a CPU. The projector reads whitened features: a shape's
colour moves DINOv2's features along directions of small variance, which an optimizer would otherwise discover late.

The words of a patch are the kind, name and colour of the thing in it, or "nothing"; whether it is the thing's middle;
its place in the picture; and the characters that are written in it.

An adapter for fewer features than the tower gives keeps what its projector says of every patch, and learns to add
what its features did not show: the characters of signs, and which things are tiny.

Axes: P patches, W words, F features of the tower, D model dim, V vocabulary.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from orbax.checkpoint import v1 as ocp
from PIL import Image

from experiments.demo_model import details
from experiments.demo_model.adapter import PROJECTOR, Weights, Whitening, init_projector
from experiments.demo_model.cutouts import COLOUR_NAMES, KINDS
from experiments.demo_model.data import Mixture, Pool
from experiments.demo_model.packing import Packer
from experiments.demo_model.scenes import Scene
from experiments.demo_model.signs import CHARACTERS
from himap_jax.checkpoint import LoadedModel
from himap_jax.inputs import Images
from himap_jax.model.network import Model
from himap_jax.run.progress import Progress

BATCH, SHAPES_EVERY = 8, 5
STEPS, PATCHES_A_STEP, RATE = 1000, 4096, 2e-3
WHITENING_PATCHES = 40_000

SHAPES = ("circle", "triangle", "rectangle")
PLACES = ("left", "right", "top", "bottom")
PLACE_WEIGHT, CHARACTER_WEIGHT = 0.7, 1.5
MIDDLE_RADIUS = 0.06  # as a share of the picture's side
COVERED, COVERED_BY_TINY = 0.3, 0.12  # a patch shows a thing that covers at least this share of it
ADDED_WEIGHT = 2.0  # of what is added to a projector
SHARPNESS, CHARACTERS_SHARE = 2.0, 0.5  # of the cross-entropy of characters


class Plan(NamedTuple):
  """The number of pictures, and how often a batch is of details: every n-th, of those that are not of shapes."""

  num_pictures: int
  details_every: int


FROM_SCRATCH, ADDING = Plan(640, 2), Plan(2000, 1)


@dataclasses.dataclass(frozen=True)
class Patches:
  """Tower features of patches, and the weight of every word for each."""

  features: Float[np.ndarray, "P F"]
  labels: Float[np.ndarray, "P W"]
  whitening: Whitening

  def at(self, chosen: np.ndarray) -> tuple[Float[np.ndarray, "C F"], Float[np.ndarray, "C W"]]:
    """Whitened features and labels of some patches, in float32."""
    return self.whitening(self.features[chosen].astype(np.float32)), self.labels[chosen].astype(np.float32)


def aligned(
  path: pathlib.Path,
  loaded: LoadedModel,
  packers: Iterable[Packer],
  mixture: Mixture,
  *,
  seed: int,
  base: Weights | None = None,
) -> tuple[Whitening, Weights]:
  """The whitening of tower features and the aligned projector of whitened features; computed once, then read.

  `base` is a projector of features, not whitened, whose image tokens are kept, with what details show added.
  """
  if not path.exists():
    model, words = loaded.model, vocabulary(mixture.names())
    by_resolution = {packer.grid: packer for packer in packers}
    plan = FROM_SCRATCH if base is None else ADDING
    parts = [collect(model, packer, mixture, words, plan, seed=seed) for packer in by_resolution.values()]
    features, labels = map(np.concatenate, zip(*parts, strict=True))
    whitening = Whitening.measure(features[:: max(1, len(features) // WHITENING_PATCHES)])
    table = model.params["language_model"]["embed_tokens"]["weight"]
    embeddings = np.asarray(word_embeddings(loaded.processor.tokenizer, table, words))
    if base is None:
      projector = fit(model, Patches(features, labels, whitening), embeddings, seed=seed)
    else:
      patches, characters = Patches(features, added(labels, words), whitening), [*map(words.index, CHARACTERS)]
      projector = add(model, patches, embeddings, whitening.unfold(base), characters, seed=seed)
    start = {"mean": whitening.mean, "matrix": whitening.matrix, "projector": projector}
    ocp.save(path, jax.tree.map(np.asarray, start))
  start = jax.tree.map(jnp.asarray, ocp.load(path))
  return Whitening(start["mean"], start["matrix"]), start["projector"]


def collect(
  model: Model, packer: Packer, mixture: Mixture, words: Sequence[str], plan: Plan, *, seed: int
) -> tuple[Float[np.ndarray, "P F"], Float[np.ndarray, "P W"]]:
  """Tower features and words of the patches of pictures at a packer's resolution."""
  encode = jax.jit(lambda model, x: model.bind().vision_tower(Images(x[:, None])).features)
  rng = np.random.default_rng(seed)
  features, labels = [], []
  with Progress(plan.num_pictures // BATCH, "batch", "patches") as progress:
    for index in range(plan.num_pictures // BATCH):
      if index % SHAPES_EVERY == 0:
        shapes = [mixture.draw_shape(rng) for _ in range(BATCH)]
        pictures = [picture for picture, _ in shapes]
        described = [describe_shape(*shape, packer.grid, words) for shape in shapes]
      else:
        is_detail = mixture.shares.detail > 0 and index % plan.details_every == 0
        draw = (mixture.draw_board if index % 2 else mixture.draw_detail) if is_detail else mixture.draw_scene
        scenes = [draw(rng) for _ in range(BATCH)]
        pictures = [scene.picture for scene in scenes]
        described = [describe_scene(scene, packer.grid, words) for scene in scenes]
      encoded = np.asarray(encode(model, packer.pixel_values(pictures)))
      features.append(encoded.astype(np.float16).reshape(-1, encoded.shape[-1]))
      labels.append(np.concatenate(described).astype(np.float16))
      progress.update()
  return np.concatenate(features), np.concatenate(labels)


def added(labels: Float[np.ndarray, "P W"], words: Sequence[str]) -> Float[np.ndarray, "P W"]:
  """Of the words of patches those to be added to a projector: characters, and what there is to say of tiny things."""
  column = {word: index for index, word in enumerate(words)}
  characters = [column[character] for character in CHARACTERS]
  of_tiny_things = [column[word] for word in ("tiny", "middle", *KINDS)]
  result = np.zeros_like(labels)
  result[:, characters] = labels[:, characters]
  is_tiny = labels[:, column["tiny"]] > 0
  result[np.ix_(is_tiny, of_tiny_things)] = labels[np.ix_(is_tiny, of_tiny_things)]
  return ADDED_WEIGHT * result


def word_embeddings(tokenizer: Any, embeddings: Float[Array, "V D"], words: Sequence[str]) -> Float[Array, "W D"]:
  """The embedding of every word within a sentence, averaged over its tokens, and of every character alone."""
  texts = [word if word in CHARACTERS else f" {word}" for word in words]
  ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
  return jnp.stack([embeddings[jnp.asarray(i)].mean(0) for i in ids])


def fit(model: Model, patches: Patches, embeddings: Float[np.ndarray, "W D"], *, seed: int) -> Weights:
  """Fits a new projector of whitened features to the words of the patches by least squares."""
  project, scale = (
    _projection(model),
    np.sqrt(np.mean(np.square(patches.labels[:65536].astype(np.float32) @ embeddings))),
  )

  def loss_fn(projector: Weights, x: Array, labels: Array) -> Array:
    return jnp.mean(jnp.square((project(projector, x) - labels @ embeddings) / scale))

  start = init_projector(jax.random.key(seed), model.params)
  return _descend(
    loss_fn, start, patches, lambda rng: rng.integers(len(patches.labels), size=PATCHES_A_STEP), seed=seed
  )


def add(
  model: Model,
  patches: Patches,
  embeddings: Float[np.ndarray, "W D"],
  base: Weights,
  characters: Sequence[int],
  *,
  seed: int,
) -> Weights:
  """Adds the words of the patches to what a projector of whitened features says.

  The loss is the squared error of the image tokens and the cross-entropy of the character, read off what is added by
  its likeness to the characters' embeddings without their mean. Every other patch of a step is one with words.

  Args:
    characters: the characters' columns in the labels.
  """
  project, scale, columns = _projection(model), np.sqrt(np.mean(np.square(embeddings))), np.asarray(characters)
  apart = embeddings[columns] - embeddings[columns].mean(axis=0)
  apart /= np.linalg.norm(apart, axis=1, keepdims=True)

  def loss_fn(projector: Weights, x: Array, labels: Array) -> Array:
    said = project(base, x)
    change = project(projector, x) - said
    error = jnp.mean(jnp.square((change - labels @ embeddings) / scale))
    shares = labels[:, columns]
    entropies = -(shares * jax.nn.log_softmax(SHARPNESS * change @ apart.T)).sum(axis=1)
    return error + CHARACTERS_SHARE * entropies.sum() / jnp.maximum(shares.sum(), 1.0)

  with_words = np.flatnonzero(patches.labels.any(axis=1))

  def draw(rng: np.random.Generator) -> np.ndarray:
    chosen = rng.integers(len(patches.labels), size=PATCHES_A_STEP)
    chosen[::2] = rng.choice(with_words, size=len(chosen[::2]))
    return chosen

  return _descend(loss_fn, base, patches, draw, seed=seed)


def _projection(model: Model) -> Callable[[Weights, Array], Array]:
  return lambda projector, x: model.replace(params={PROJECTOR: projector}).bind().multi_modal_projector(x[None])[0]


def _descend(
  loss_fn: Callable[[Weights, Array, Array], Array],
  projector: Weights,
  patches: Patches,
  draw: Callable[[np.random.Generator], np.ndarray],
  *,
  seed: int,
) -> Weights:
  """Minimises a loss of a projector, features and labels over drawn patches."""
  optimizer, rng = optax.adam(optax.cosine_decay_schedule(RATE, STEPS)), np.random.default_rng(seed)

  @jax.jit
  def step(projector: Weights, state: Any, x: Array, labels: Array) -> tuple[Weights, Any]:
    updates, state = optimizer.update(jax.grad(loss_fn)(projector, x, labels), state)
    return optax.apply_updates(projector, updates), state

  state = optimizer.init(projector)
  with Progress(STEPS, "step", "projector") as progress:
    for _ in range(STEPS):
      projector, state = step(projector, state, *patches.at(draw(rng)))
      progress.update()
  return projector


def vocabulary(names: Sequence[str]) -> list[str]:
  words = [*PLACES, "nothing", "middle", "tiny", *KINDS, details.SIGN.kind, *COLOUR_NAMES, *SHAPES, "teal", *names]
  return list(dict.fromkeys([*words, *CHARACTERS]))


def describe(
  instances: np.ndarray,
  things: Sequence[tuple[Sequence[str], tuple[float, float]]],
  grid: int,
  words: Sequence[str],
  writing: np.ndarray | None = None,
) -> Float[np.ndarray, "P W"]:
  """The weight of each word of a vocabulary for each patch; `grid` is the number of patches along a side.

  `instances` holds the thing number of every pixel, 0 in the background; `things` are their words and middles;
  `writing` holds the code of the character of every pixel, or 0.
  """
  column = {word: index for index, word in enumerate(words)}
  labels = np.zeros((grid, grid, len(words)), np.float32)
  y, x = (np.mgrid[0:grid, 0:grid] + 0.5) / grid
  for word, place in zip(PLACES, (1 - 2 * x, 2 * x - 1, 1 - 2 * y, 2 * y - 1), strict=True):
    labels[..., column[word]] = PLACE_WEIGHT * np.maximum(place, 0)
  cover = _cover(instances, np.arange(1, len(things) + 1), grid)
  largest = cover.argmax(0)
  least = np.array([COVERED_BY_TINY if "tiny" in own else COVERED for own, _ in things])
  shown = cover.max(0) >= least[largest]
  labels[..., column["nothing"]] = ~shown
  for number, (own_words, (u, v)) in enumerate(things):
    for word in own_words:
      labels[shown & (largest == number), column[word]] = 1.0
    near = np.exp(-((x - u) ** 2 + (y - v) ** 2) / MIDDLE_RADIUS**2)
    labels[..., column["middle"]] = np.maximum(labels[..., column["middle"]], near)
  codes = np.unique(writing)[1:] if writing is not None else []
  for code, share in zip(codes, _cover(writing, codes, grid) if len(codes) else (), strict=True):
    labels[..., column[chr(code)]] = CHARACTER_WEIGHT * share
  return labels.reshape(grid * grid, len(words))


def _cover(numbers: np.ndarray, wanted: np.ndarray, grid: int) -> Float[np.ndarray, "N g g"]:
  """The share of each patch that pixels of each wanted number cover."""
  edges = np.linspace(0, len(numbers), grid + 1).round().astype(int)
  masks = (numbers == wanted[:, None, None]).astype(np.float32)
  sums = np.add.reduceat(np.add.reduceat(masks, edges[:-1], 1), edges[:-1], 2)
  return sums / np.outer(np.diff(edges), np.diff(edges))


def describe_scene(scene: Scene, grid: int, words: Sequence[str]) -> Float[np.ndarray, "P W"]:
  things = [
    ([word for word in (*thing.cutout[1:], "tiny" if thing.is_tiny else None) if word], thing.middle)
    for thing in scene.things
  ]
  return describe(scene.instances, things, grid, words, scene.writing)


def describe_shape(picture: Image.Image, pool: Pool, grid: int, words: Sequence[str]) -> Float[np.ndarray, "P W"]:
  """Describes an easy-VQA picture, whose one shape differs in colour from the picture's corner."""
  pixels = np.asarray(picture).astype(int)
  shape = np.abs(pixels - pixels[0, 0]).sum(-1) > 30
  y, x = np.nonzero(shape)
  middle = ((x.mean() + 0.5) / len(shape), (y.mean() + 0.5) / len(shape))
  return describe(shape.astype(np.uint8), [([answer for _, answer in pool.open_ended], middle)], grid, words)
