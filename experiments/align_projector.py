"""Gives the projector a start: every image token becomes the sum of the word embeddings that describe its patch.

The words are what a patch shows (kind, name and colour of the thing in it, or "nothing"), whether it is the thing's middle,
and where it lies in the picture. The language model can read such tokens before it is trained on any, as text. LLaVA aligns its
projector on captions for the same reason; words for every patch take a few minutes of CPU instead.

Axes: P patches, W words, F features of the tower, D model dim.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from tqdm import tqdm

from experiments.cutouts import COLOUR_NAMES, KINDS
from experiments.demo_data import Lessons, Packer
from experiments.scenes import Scene
from himap_jax.llava import Llava

SHAPES = ("circle", "triangle", "rectangle")
PLACES = ("left", "right", "top", "bottom")
PLACE_WEIGHT = 0.7
MIDDLE_RADIUS = 0.06  # in shares of the picture's side
COVERED = 0.3  # a patch shows a thing that covers so much of it
PICTURES, BATCH, SHAPES_EVERY = 640, 8, 5
STEPS, PATCHES_A_STEP, RATE = 1000, 4096, 2e-3


def vocabulary(names: Sequence[str]) -> list[str]:
  """All words that may describe a patch."""
  return list(dict.fromkeys([*PLACES, "nothing", "middle", *KINDS, *COLOUR_NAMES, *SHAPES, "teal", *names]))


def describe(
  owner: np.ndarray,
  things: Sequence[Sequence[str]],
  middles: Sequence[tuple[float, float]],
  grid: int,
  words: list[str],
) -> Float[np.ndarray, "P W"]:
  """How much each word describes each patch.

  Args:
    owner: `[h, h]` for every pixel the number of its thing, 0 in the background.
    things: the words of every thing.
    middles: of every thing, in shares of width and height.
    grid: patches along a side.
    words: the vocabulary.
  """
  column = {word: index for index, word in enumerate(words)}
  labels = np.zeros((grid, grid, len(words)), np.float32)
  y, x = (np.mgrid[0:grid, 0:grid] + 0.5) / grid
  for word, place in zip(PLACES, (1 - 2 * x, 2 * x - 1, 1 - 2 * y, 2 * y - 1), strict=True):
    labels[..., column[word]] = PLACE_WEIGHT * np.maximum(place, 0)
  edges = np.linspace(0, len(owner), grid + 1).round().astype(int)
  cover = np.stack([_mean_over(owner == number, edges) for number in range(1, len(things) + 1)])
  largest = cover.argmax(0)
  shown = cover.max(0) >= COVERED
  labels[..., column["nothing"]] = ~shown
  for number, (thing, (u, v)) in enumerate(zip(things, middles, strict=True)):
    mine = shown & (largest == number)
    for word in thing:
      labels[mine, column[word]] = 1.0
    near = np.exp(-((x - u) ** 2 + (y - v) ** 2) / MIDDLE_RADIUS**2)
    labels[..., column["middle"]] = np.maximum(labels[..., column["middle"]], near)
  return labels.reshape(grid * grid, len(words))


def describe_scene(scene: Scene, grid: int, words: list[str]) -> Float[np.ndarray, "P W"]:
  """What the patches of a scene show."""
  cutouts = [thing.cutout for thing in scene.things]
  things = [[word for word in (c.kind, c.name, c.colour) if word] for c in cutouts]
  return describe(scene.owner, things, [thing.middle for thing in scene.things], grid, words)


def describe_shape(pixels: np.ndarray, answers: Sequence[str], grid: int, words: list[str]) -> Float[np.ndarray, "P W"]:
  """What the patches of an easy-VQA picture show: its one shape differs in colour from the picture's corner."""
  owner = np.abs(pixels.astype(int) - pixels[0, 0].astype(int)).sum(-1) > 30
  y, x = np.nonzero(owner)
  middle = ((x.mean() + 0.5) / len(owner), (y.mean() + 0.5) / len(owner))
  return describe(owner.astype(np.uint8), [list(answers)], [middle], grid, words)


def _mean_over(mask: np.ndarray, edges: np.ndarray) -> np.ndarray:
  sums = np.add.reduceat(np.add.reduceat(mask.astype(np.float32), edges[:-1], 0), edges[:-1], 1)
  return sums / np.outer(np.diff(edges), np.diff(edges))


def word_embeddings(tokenizer: Any, embeddings: Float[Array, "V D"], words: Sequence[str]) -> Float[Array, "W D"]:
  """The embedding of every word as it stands within a sentence; of several tokens the mean."""
  ids = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in words]
  return jnp.stack([embeddings[jnp.asarray(i)].mean(0) for i in ids])


def patches(
  model: Llava, params: Any, packers: Sequence[Packer], lessons: Lessons, words: list[str], *, seed: int
) -> tuple[Float[np.ndarray, "P F"], Float[np.ndarray, "P W"]]:
  """Tower features and words of the patches of `PICTURES` pictures at every packer's resolution."""
  encode = jax.jit(lambda params, x: model.apply({"params": params}, x, method=lambda m, x: m.vision_tower(x).features))
  features, labels = [], []
  for packer in packers:
    rng = np.random.default_rng(seed)
    for index in tqdm(range(PICTURES // BATCH), unit="batch", desc="patches"):
      if index % SHAPES_EVERY == 0:
        drawn = [lessons.shapes.shape(rng) for _ in range(BATCH)]
        pictures = [picture for picture, _ in drawn]
        described = [describe_shape(np.asarray(picture), answers, packer.grid, words) for picture, answers in drawn]
      else:
        drawn = [lessons.scenes.compose(rng) for _ in range(BATCH)]
        pictures = [scene.picture for scene in drawn]
        described = [describe_scene(scene, packer.grid, words) for scene in drawn]
      features.append(np.asarray(encode(params, packer.pixel_values(pictures))).astype(np.float16))
      labels.append(np.stack(described).astype(np.float16))
  return tuple(np.concatenate([part.reshape(-1, part.shape[-1]) for part in parts]) for parts in (features, labels))


def align(
  model: Llava,
  projector: Any,
  features: Float[np.ndarray, "P F"],
  labels: Float[np.ndarray, "P W"],
  embeddings: Float[Array, "W D"],
  *,
  seed: int,
) -> Any:
  """Fits the projector, on whitened features, to the words of the patches by least squares."""
  embeddings = np.asarray(embeddings)
  scale = float(np.sqrt(np.mean(np.square(labels[:65536].astype(np.float32) @ embeddings))))
  schedule = optax.cosine_decay_schedule(RATE, STEPS)
  optimizer = optax.adam(schedule)

  def loss_fn(projector: Any, x: Array, y: Array) -> Array:
    out = model.apply(
      {"params": {"multi_modal_projector": projector}}, x[None], method=lambda m, x: m.multi_modal_projector(x)
    )
    return jnp.mean(jnp.square((out - y[None]) / scale))

  @jax.jit
  def step(projector: Any, state: Any, x: Array, y: Array) -> tuple[Any, Any, Array]:
    loss, grads = jax.value_and_grad(loss_fn)(projector, x, y)
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(projector, updates), state, loss

  rng = np.random.default_rng(seed)
  state = optimizer.init(projector)
  progress = tqdm(range(STEPS), unit="step", desc="projector")
  for _ in progress:
    chosen = rng.integers(len(features), size=PATCHES_A_STEP)
    projector, state, loss = step(
      projector, state, features[chosen].astype(np.float32), labels[chosen].astype(np.float32) @ embeddings
    )
    progress.set_postfix_str(f"loss {float(loss):.3f}", refresh=False)
  return projector
