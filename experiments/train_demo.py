"""Trains the demo model: a projector and low-rank updates of the language model, on composed scenes and easy-VQA.

    python -m experiments.train_demo --workdir=… --adapter=checkpoints_convert/demo/adapter.safetensors

Everything else stays as it comes out of its package: the DINOv2 tower and SmolLM2. A training sequence holds one image and
several independent questions about it:

    [ system, image ][ question 1, answer 1 ][ question 2, answer 2 ] … padding

The projector is trained on whitened features: the colour of a shape moves DINOv2's features along directions of small
variance, which the optimizer would otherwise discover late. The whitening is folded into the projector that is shipped.

Each question attends to the shared prefix and to itself and its positions go on from the prefix, so that every question is
trained exactly as it is asked at inference, alone. Training begins at a low image resolution, where a step is cheap, and
ends at the demo's own. Interrupt it at any time: the same command resumes from the last checkpoint in the work directory.

Axes: B images, S slots, A answer tokens, D model dim, V vocabulary.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from orbax.checkpoint import v1 as ocp
from tqdm import tqdm

from checkpoints_convert.demo.assemble import assemble
from experiments.align_projector import align, patches, vocabulary, word_embeddings
from experiments.demo_data import Batch, Lessons, Packer
from experiments.demo_model import (
  Whitening,
  answer_logits,
  export_adapter,
  import_adapter,
  init_lora,
  init_projector,
  measure_whitening,
)
from himap_jax import attention, checkpoint, sharding
from himap_jax.llava import Llava

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Checkpoints of the training; it resumes from the last one.", required=True
)
_ADAPTER = flags.DEFINE_string(
  "adapter", None, "Where to write the trained projector and LoRA (safetensors).", required=True
)
_INIT_ADAPTER = flags.DEFINE_string("init_adapter", None, "An adapter to start from; from scratch when absent.")
_STAGES = flags.DEFINE_list(
  "stages",
  ["168:840:3:208", "336:200:1:208"],
  "Stages as image_size:steps:images:question_slots: pixels, steps, images a step, question and answer tokens an image.",
)
_SCENE_SHARE = flags.DEFINE_float("scene_share", 0.75, "Share of pictures that are scenes; the others are easy-VQA's.")
_RANK = flags.DEFINE_integer("rank", 16, "Rank of the low-rank updates.")
_PROJECTOR_RATE = flags.DEFINE_float("projector_rate", 5e-4, "Peak learning rate of the projector.")
_LORA_RATE = flags.DEFINE_float("lora_rate", 8e-4, "Peak learning rate of the low-rank updates.")
_DTYPE = flags.DEFINE_enum(
  "dtype", "bfloat16", ["bfloat16", "float32"], "What the model computes in; what is trained is float32."
)
_SAVE_EVERY = flags.DEFINE_integer("save_every", 40, "Steps between checkpoints.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of initialisation and data order.")
WHITENING_PATCHES = 40_000


@dataclasses.dataclass(frozen=True)
class Stage:
  """Steps at one resolution."""

  image_size: int
  steps: int
  images: int
  question_slots: int


def make_step(model: Llava, frozen: Any, whitening: Whitening, optimizer: optax.GradientTransformation) -> Any:
  """One update of `{"projector", "lora"}`; returns the new state, the loss and the share of right answer tokens."""

  def loss_fn(trainable: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    params = {**frozen, "multi_modal_projector": whitening.fold(trainable["projector"])}
    logits = answer_logits(model, params, trainable["lora"], batch)
    weight = batch.answer_valid.astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.answers)
    right = (logits.argmax(-1) == batch.answers).astype(jnp.float32)
    return (loss * weight).sum() / weight.sum(), (right * weight).sum() / weight.sum()

  @jax.jit
  def step(state: dict[str, Any], frozen: Any, batch: Batch) -> tuple[dict[str, Any], jax.Array, jax.Array]:
    (loss, right), grads = jax.value_and_grad(loss_fn, has_aux=True)(state["trainable"], frozen, batch)
    updates, optimizer_state = optimizer.update(grads, state["optimizer"], state["trainable"])
    trainable = optax.apply_updates(state["trainable"], updates)
    return {"trainable": trainable, "optimizer": optimizer_state, "step": state["step"] + 1}, loss, right

  return lambda state, batch: step(state, frozen, batch)


def make_optimizer(num_steps: int) -> optax.GradientTransformation:
  """AdamW with warm-up and cosine decay; the projector has its own rate."""

  def adamw(peak: float) -> optax.GradientTransformation:
    return optax.adamw(optax.warmup_cosine_decay_schedule(0.0, peak, min(20, num_steps // 2), num_steps, 0.02 * peak))

  return optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.multi_transform(
      {"projector": adamw(_PROJECTOR_RATE.value), "lora": adamw(_LORA_RATE.value)},
      {"projector": "projector", "lora": "lora"},
    ),
  )


def start(
  model: Llava, params: Any, processor: Any, packers: list[Packer], lessons: Lessons, path: pathlib.Path
) -> tuple[Whitening, Any]:
  """The whitening of the tower's features and an aligned projector; made once, then read from `path`."""
  if not path.exists():
    words = vocabulary(lessons.scenes.names)
    resolutions = {packer.grid: packer for packer in packers}
    features, labels = patches(model, params, list(resolutions.values()), lessons, words, seed=_SEED.value)
    whitening = measure_whitening(features[:: max(1, len(features) // WHITENING_PATCHES)])
    embeddings = word_embeddings(processor.tokenizer, params["language_model"]["embed_tokens"]["weight"], words)
    projector = init_projector(jax.random.key(_SEED.value), params)
    projector = align(model, projector, whitening(features), labels, embeddings, seed=_SEED.value)
    ocp.save(path, {"mean": whitening.mean, "matrix": whitening.matrix, "projector": projector})
  state = ocp.load(path)
  return Whitening(jnp.asarray(state["mean"]), jnp.asarray(state["matrix"])), jax.tree.map(
    jnp.asarray, state["projector"]
  )


def train(
  model: Llava, params: Any, processor: Any, stages: list[Stage], workdir: pathlib.Path, adapter: pathlib.Path
) -> None:
  """Runs the stages from the last checkpoint on."""
  num_steps = sum(stage.steps for stage in stages)
  optimizer = make_optimizer(num_steps)
  frozen = {name: value for name, value in params.items() if name != "multi_modal_projector"}
  frozen = jax.tree.map(lambda x: x.astype(model.dtype), frozen)
  packers = [
    Packer(processor, model.config, image_size=stage.image_size, question_slots=stage.question_slots)
    for stage in stages
  ]
  lessons = Lessons(scene_share=_SCENE_SHARE.value)
  whitening, projector = start(model, params, processor, packers, lessons, workdir / "start")
  lora = init_lora(jax.random.key(_SEED.value), params["language_model"], _RANK.value)
  if _INIT_ADAPTER.value:
    projector, lora = import_adapter(_INIT_ADAPTER.value)
    projector = whitening.unfold(projector)
  trainable = {"projector": projector, "lora": lora}
  state = {"trainable": trainable, "optimizer": optimizer.init(trainable), "step": jnp.int32(0)}

  def export(state: Any) -> None:
    export_adapter(adapter, whitening.fold(state["trainable"]["projector"]), state["trainable"]["lora"])

  step_fn = make_step(model, frozen, whitening, optimizer)
  with ocp.training.Checkpointer(
    workdir, preservation_policy=ocp.training.preservation_policies.LatestN(2)
  ) as checkpointer:
    if checkpointer.latest is not None:
      state = checkpointer.load(checkpointer.latest.step, state)
    first_step = int(state["step"])
    progress = tqdm(total=num_steps, initial=first_step, unit="step", smoothing=0.05)
    losses, rights = [], []
    before = 0
    for stage, packer in zip(stages, packers, strict=True):
      for index in range(max(before, first_step), before + stage.steps):
        batch = packer.pack(lessons.draw(stage.images, seed=(_SEED.value, index)))
        state, loss, right = step_fn(state, batch)
        losses.append(float(loss))
        rights.append(float(right))
        progress.update()
        progress.set_postfix_str(
          f"{stage.image_size} px, loss {np.mean(losses[-20:]):.3f}, right {np.mean(rights[-20:]):.3f}"
        )
        if (index + 1) % _SAVE_EVERY.value == 0 or index + 1 == num_steps:
          checkpointer.save_pytree(index + 1, state)
          export(state)
      before += stage.steps
  export(state)


def main(_) -> None:
  stages = [Stage(*map(int, stage.split(":"))) for stage in _STAGES.value]
  workdir = pathlib.Path(_WORKDIR.value).absolute()
  workdir.mkdir(parents=True, exist_ok=True)
  base = assemble(workdir / "base", cache_dir=checkpoint.default_cache_dir(), adapter=None)
  loaded = checkpoint.load(str(base), dtype=jnp.float32)
  model = Llava(loaded.config, jnp.dtype(_DTYPE.value), attention.for_mesh(sharding.make_mesh()))
  train(model, loaded.params, loaded.processor, stages, workdir / "checkpoints", pathlib.Path(_ADAPTER.value))


if __name__ == "__main__":
  app.run(main)
