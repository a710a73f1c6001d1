"""Aligns the projector: every image token becomes the sum of the word embeddings that describe its patch.

    python -m experiments.demo_model.align --workdir=…

The language model can read such tokens, as text, before it is trained on any. LLaVA aligns its projector on captions for the
same reason; words for every patch take a few minutes of CPU instead. `train` aligns where this has not been done yet.

The projector reads whitened features: the colour of a shape moves DINOv2's features along directions of small variance, which
an optimizer would otherwise discover late.

Axes: P patches, W words, F features of the tower, D model dim, V vocabulary.
"""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from jaxtyping import Array, Float
from orbax.checkpoint import v1 as ocp

from checkpoints_convert.demo.assemble import assemble
from experiments.demo_model.adapter import Weights, Whitening, init_projector
from experiments.demo_model.data import Mixture
from experiments.demo_model.packing import Packer
from experiments.demo_model.patches import describe_scene, describe_shape, vocabulary
from himap_jax import checkpoint
from himap_jax.model.network import Model, Network
from himap_jax.run import command
from himap_jax.run.progress import Progress

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the training, to resume from.", required=True)
_STAGES = flags.DEFINE_list(
  "stages",
  ["168:840:3:208", "336:200:1:208"],
  "Stages as image_size:steps:images:question_slots: pixels, steps, images a step, question and answer tokens an image.",
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of initialisation and data order.")

PICTURES, BATCH, SHAPES_EVERY = 640, 8, 5
STEPS, PATCHES_A_STEP, RATE = 1000, 4096, 2e-3
WHITENING_PATCHES = 40_000


class Stage(NamedTuple):
  """Steps at one resolution, each on a number of images."""

  image_size: int
  steps: int
  images: int
  packer: Packer


class Base(NamedTuple):
  """What training starts from: the demo model without an adapter, in float32, and a directory for its checkpoints."""

  model: Model
  tokenizer: Any
  stages: list[Stage]
  seed: int
  directory: pathlib.Path

  def in_dtype(self, dtype: Any) -> Model:
    """The model with parameters and activations of another dtype."""
    network = Network(self.model.config, dtype, self.model.network.kernels)
    return Model(jax.tree.map(lambda x: x.astype(dtype), self.model.params), network)


def base_from_flags() -> Base:
  """The training that the flags describe; raises `UserError` at a malformed stage."""
  stages = []
  numbers = command.numbers(_STAGES, _four_numbers, "such as 168:840:3:208")
  workdir = pathlib.Path(_WORKDIR.value).absolute()
  with command.user_error(f"--workdir: cannot create {workdir}"):
    workdir.mkdir(parents=True, exist_ok=True)
  directory = assemble(workdir / "base", cache_dir=checkpoint.default_cache_dir(), adapter=None)
  loaded = checkpoint.load(str(directory), dtype=jnp.float32)
  for side, steps, images, question_slots in numbers:
    packer = Packer(loaded.processor, loaded.config, image_size=side, question_slots=question_slots)
    stages.append(Stage(side, steps, images, packer))
  return Base(loaded.model, loaded.processor.tokenizer, stages, _SEED.value, workdir / "checkpoints")


def _four_numbers(text: str) -> tuple[int, int, int, int]:
  first, second, third, fourth = map(int, text.split(":"))
  return first, second, third, fourth


def aligned(base: Base, mixture: Mixture) -> tuple[Whitening, Weights]:
  """The whitening of the tower's features, and the aligned projector on whitened features; made once, then read."""
  path = base.directory / "start"
  if not path.exists():
    model, words = base.model, vocabulary(mixture.scenes.names)
    by_resolution = {stage.packer.grid: stage.packer for stage in base.stages}
    parts = [collect(model, packer, mixture, words, seed=base.seed) for packer in by_resolution.values()]
    features, labels = map(np.concatenate, zip(*parts, strict=True))
    whitening = Whitening.measure(features[:: max(1, len(features) // WHITENING_PATCHES)])
    table = model.params["language_model"]["embed_tokens"]["weight"]
    embeddings = word_embeddings(base.tokenizer, table, words)
    projector = init_projector(jax.random.key(base.seed), model.params)
    projector = fit(model, projector, whitening(features), labels, embeddings, seed=base.seed)
    ocp.save(path, {"mean": whitening.mean, "matrix": whitening.matrix, "projector": projector})
  start = jax.tree.map(jnp.asarray, ocp.load(path))
  return Whitening(start["mean"], start["matrix"]), start["projector"]


def collect(
  model: Model, packer: Packer, mixture: Mixture, words: Sequence[str], *, seed: int
) -> tuple[Float[np.ndarray, "P F"], Float[np.ndarray, "P W"]]:
  """Tower features and words of the patches of `PICTURES` pictures at a packer's resolution."""
  encode = jax.jit(lambda model, x: model.bind().vision_tower(x).features)
  rng = np.random.default_rng(seed)
  features, labels = [], []
  with Progress(PICTURES // BATCH, "batch", "patches") as progress:
    for index in range(PICTURES // BATCH):
      if index % SHAPES_EVERY == 0:
        drawn = [mixture.easyvqa.draw_picture(rng) for _ in range(BATCH)]
        described = [describe_shape(*picture_and_words, packer.grid, words) for picture_and_words in drawn]
      else:
        drawn = [(scene.picture, scene) for scene in (mixture.scenes.draw_scene(rng) for _ in range(BATCH))]
        described = [describe_scene(scene, packer.grid, words) for _, scene in drawn]
      encoded = np.asarray(encode(model, packer.pixel_values([picture for picture, _ in drawn])))
      features.append(encoded.astype(np.float16).reshape(-1, encoded.shape[-1]))
      labels.append(np.concatenate(described).astype(np.float16))
      progress.update()
  return np.concatenate(features), np.concatenate(labels)


def word_embeddings(tokenizer: Any, embeddings: Float[Array, "V D"], words: Sequence[str]) -> Float[Array, "W D"]:
  """The embedding of every word as it stands within a sentence; of several tokens the mean."""
  ids = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in words]
  return jnp.stack([embeddings[jnp.asarray(i)].mean(0) for i in ids])


def fit(
  model: Model,
  projector: Weights,
  features: Float[np.ndarray, "P F"],
  labels: Float[np.ndarray, "P W"],
  embeddings: Float[Array, "W D"],
  *,
  seed: int,
) -> Weights:
  """Fits the projector, on whitened features, to the words of the patches by least squares."""
  embeddings = np.asarray(embeddings)
  scale = float(np.sqrt(np.mean(np.square(labels[:65536].astype(np.float32) @ embeddings))))
  optimizer = optax.adam(optax.cosine_decay_schedule(RATE, STEPS))

  def loss_fn(projector: Weights, x: Array, y: Array) -> Array:
    out = model.replace(params={"multi_modal_projector": projector}).bind().multi_modal_projector(x[None])
    return jnp.mean(jnp.square((out - y[None]) / scale))

  @jax.jit
  def step(projector: Weights, state: Any, x: Array, y: Array) -> tuple[Weights, Any]:
    grads = jax.grad(loss_fn)(projector, x, y)
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(projector, updates), state

  rng = np.random.default_rng(seed)
  state = optimizer.init(projector)
  with Progress(STEPS, "step", "projector") as progress:
    for _ in range(STEPS):
      chosen = rng.integers(len(features), size=PATCHES_A_STEP)
      x, y = features[chosen].astype(np.float32), labels[chosen].astype(np.float32) @ embeddings
      projector, state = step(projector, state, x, y)
      progress.update()
  return projector


def run() -> int:
  """Aligns the projector of the training that the flags describe."""
  base = base_from_flags()
  aligned(base, Mixture())
  print(base.directory / "start")
  return 0


if __name__ == "__main__":
  app.run(lambda argv: command.execute("experiments.demo_model.align", argv, run))
