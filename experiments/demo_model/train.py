"""Trains the demo model: a projector and low-rank updates of the language model, on composed scenes and easy-VQA.

    python -m experiments.demo_model.train --workdir=… --adapter=checkpoints_convert/demo/adapter.safetensors

Everything else stays as it comes out of its package: the DINOv2 tower and SmolLM2. A training sequence holds one image and
several independent questions about it:

    [ system, image ][ question 1, answer 1 ][ question 2, answer 2 ] … padding

Each question attends to the shared prefix and to itself, and its positions go on from the prefix, so that every question is
trained exactly as it is asked at inference, alone. The projector is trained on whitened features (see `align`); the whitening
is folded into the projector that is exported. Training begins at a low image resolution, where a step is cheap, and ends at
the demo's own. Interrupt it at any time: the same command resumes from the last checkpoint in the work directory.

Axes: B images, S slots, A answer tokens, D model dim, V vocabulary.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from jaxtyping import Array, Float
from orbax.checkpoint import v1 as ocp

from experiments.demo_model import align
from experiments.demo_model.adapter import Adapter, Whitening, answer_logits, init_lora
from experiments.demo_model.align import Base
from experiments.demo_model.data import Mixture
from experiments.demo_model.packing import Batch
from himap_jax.model.network import Model
from himap_jax.run import command
from himap_jax.run.progress import Progress

flags.adopt_module_key_flags(align)  # for --help

_ADAPTER = flags.DEFINE_string(
  "adapter", None, "Where to write the trained projector and LoRA (safetensors).", required=True
)
_INIT_ADAPTER = flags.DEFINE_string("init_adapter", None, "An adapter to start from; from scratch when absent.")
_SCENE_SHARE = flags.DEFINE_float("scene_share", 0.75, "Share of pictures that are scenes; the others are easy-VQA's.")
_RANK = flags.DEFINE_integer("rank", 16, "Rank of the low-rank updates.")
_PROJECTOR_RATE = flags.DEFINE_float("projector_rate", 5e-4, "Peak learning rate of the projector.")
_LORA_RATE = flags.DEFINE_float("lora_rate", 8e-4, "Peak learning rate of the low-rank updates.")
_DTYPE = flags.DEFINE_enum(
  "dtype", "bfloat16", sorted(command.DTYPES), "What the model computes in; what is trained is float32."
)
_SAVE_EVERY = flags.DEFINE_integer("save_every", 40, "Steps between checkpoints.")

State = dict[str, Any]  # the adapter being trained, the optimizer's state and the number of steps done


def make_step(
  whitening: Whitening, optimizer: optax.GradientTransformation
) -> Callable[[State, Model, Batch], tuple[State, Float[Array, ""], Float[Array, ""]]]:
  """One update; returns the new state, the loss and the share of right answer tokens.

  The model's projector takes no part: it is that of the adapter being trained, with the whitening folded into it.
  """

  def loss_fn(adapter: Adapter, model: Model, batch: Batch) -> tuple[Array, Array]:
    params = {**model.params, "multi_modal_projector": whitening.fold(adapter.projector)}
    logits = answer_logits(model.replace(params=params), adapter.lora, batch)
    weight = batch.answer_valid.astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.answers)
    right = (logits.argmax(-1) == batch.answers).astype(jnp.float32)
    return (loss * weight).sum() / weight.sum(), (right * weight).sum() / weight.sum()

  @jax.jit
  def step(state: State, model: Model, batch: Batch) -> tuple[State, Array, Array]:
    (loss, right), grads = jax.value_and_grad(loss_fn, has_aux=True)(state["trainable"], model, batch)
    updates, optimizer_state = optimizer.update(grads, state["optimizer"], state["trainable"])
    adapter = optax.apply_updates(state["trainable"], updates)
    return {"trainable": adapter, "optimizer": optimizer_state, "step": state["step"] + 1}, loss, right

  return step


def make_optimizer(num_steps: int) -> optax.GradientTransformation:
  """AdamW with warm-up and cosine decay; the projector has its own rate."""

  def adamw(peak: float) -> optax.GradientTransformation:
    return optax.adamw(optax.warmup_cosine_decay_schedule(0.0, peak, min(20, num_steps // 2), num_steps, 0.02 * peak))

  parts = {"projector": adamw(_PROJECTOR_RATE.value), "lora": adamw(_LORA_RATE.value)}
  return optax.chain(optax.clip_by_global_norm(1.0), optax.multi_transform(parts, Adapter("projector", "lora")))


def train(base: Base, path: pathlib.Path) -> None:
  """Runs the stages from the last checkpoint on; writes the adapter at every checkpoint and at the end."""
  plan = [stage for stage in base.stages for _ in range(stage.steps)]
  mixture = Mixture(scene_share=_SCENE_SHARE.value)
  whitening, projector = align.aligned(base, mixture)
  if _INIT_ADAPTER.value:
    adapter = Adapter.read(_INIT_ADAPTER.value)
    adapter = adapter.replace(projector=whitening.unfold(adapter.projector))
  else:
    language_model = base.model.params["language_model"]
    adapter = Adapter(projector, init_lora(jax.random.key(base.seed), language_model, _RANK.value))
  optimizer = make_optimizer(len(plan))
  state = {"trainable": adapter, "optimizer": optimizer.init(adapter), "step": jnp.int32(0)}
  model, step = base.in_dtype(command.DTYPES[_DTYPE.value]), make_step(whitening, optimizer)

  def export() -> None:
    adapter = state["trainable"]
    adapter.replace(projector=whitening.fold(adapter.projector)).save(path)

  policy = ocp.training.preservation_policies.LatestN(2)
  with ocp.training.Checkpointer(base.directory, preservation_policy=policy) as checkpointer:
    if checkpointer.latest is not None:
      state = checkpointer.load(checkpointer.latest.step, state)
    first_step = int(state["step"])
    recent = []
    with Progress(len(plan) - first_step, "step", "training") as progress:
      for index, stage in enumerate(plan[first_step:], start=first_step + 1):
        batch = stage.packer.pack(mixture.draw(stage.images, seed=(base.seed, index - 1)))
        state, loss, right = step(state, model, batch)
        recent = [*recent[-19:], (float(loss), float(right))]
        progress.update()
        if index % _SAVE_EVERY.value == 0 or index == len(plan):
          checkpointer.save_pytree(index, state)
          export()
          loss, right = np.mean(recent, axis=0)
          print(f"step {index}: {stage.image_size} px, loss {loss:.3f}, right {right:.3f}", flush=True)
  export()


def run() -> int:
  """Trains as the flags describe."""
  train(align.base_from_flags(), pathlib.Path(_ADAPTER.value))
  return 0


if __name__ == "__main__":
  app.run(lambda argv: command.execute("experiments.demo_model.train", argv, run))
