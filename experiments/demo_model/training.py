"""Trains one part: a projector and low-rank updates of the language model, on scenes, details and easy-VQA.

In `demo_cross`, cross-attention layers are trained, too (`checkpoints_convert.demo.cross`). The tower and the rest of
the language model stay frozen. A training sequence holds one image and several independent questions about it:

    [ system, image ][ question 1, answer 1 ][ question 2, answer 2 ] … padding

Each question attends to the shared prefix and to itself, and its positions continue from the prefix, so that every
question is trained exactly as it is asked at inference, alone. The projector is trained on whitened features (see
`align`); the whitening is folded into the exported projector.
"""

import pathlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from orbax.checkpoint import v1 as ocp

from checkpoints_convert.demo.cross import trained
from experiments.demo_model.adapter import Adapter, Whitening, init_cross, init_lora, widen
from experiments.demo_model.align import aligned
from experiments.demo_model.data import Mixture
from experiments.demo_model.gradients import Gradients, jax_gradients
from experiments.demo_model.packing import Batch, Packer
from experiments.demo_model.recipes import Part, Rates
from himap_jax import checkpoint
from himap_jax.checkpoint import LoadedModel
from himap_jax.model.network import Model, Network
from himap_jax.run.progress import Progress

State = dict[str, Any]  # the adapter being trained, the optimizer's state and the number of steps done


class Options(NamedTuple):
  """How a part is computed.

  Attributes:
    dtype: name of the model's dtype; trained parameters are float32.
    gradients: what computes gradients: jax or torch.
    save_every: steps between checkpoints.
  """

  dtype: str
  gradients: str
  save_every: int


def train(part: Part, base: pathlib.Path, start: Adapter | None, directory: pathlib.Path, options: Options) -> Adapter:
  """Trains a part on a checkpoint without an adapter, and resumes from the last checkpoint in a directory.

  Args:
    base: folder of the checkpoint.
    start: the adapter to start from, whose projector is widened if it reads fewer features; None: from scratch.
  """
  loaded = checkpoint.load(str(base), dtype=jnp.float32)
  packers = {stage: Packer(loaded, stage.image_size, stage.question_slots) for stage in part.stages}
  mixture = Mixture(part.shares)
  whitening, adapter = _start(part, start, loaded, packers.values(), mixture, directory / "start")
  plan = [stage for stage in part.stages for _ in range(stage.steps)]
  optimizer = make_optimizer(part.rates, len(plan))
  state = {"trainable": adapter, "optimizer": optimizer.init(adapter), "step": jnp.int32(0)}
  step = make_step(_gradients(loaded, base, adapter, options), whitening, optimizer)
  policy = ocp.training.preservation_policies.LatestN(2)
  with ocp.training.Checkpointer(directory, preservation_policy=policy) as checkpointer:
    if checkpointer.latest is not None:
      state = checkpointer.load(checkpointer.latest.step, state)
    first_step = int(state["step"])
    recent = []
    with Progress(len(plan) - first_step, "step", f"part {part.name}") as progress:
      for index, stage in enumerate(plan[first_step:], start=first_step + 1):
        batch = packers[stage].pack(mixture.draw(stage.images, seed=(part.seed, index - 1)))
        state, loss, right = step(state, batch)
        recent = [*recent[-19:], (float(loss), float(right))]
        progress.update()
        if index % options.save_every == 0 or index == len(plan):
          checkpointer.save(index, state)
          loss, right = np.mean(recent, axis=0)
          print(f"part {part.name}, step {index}: loss {loss:.3f}, right {right:.3f}", flush=True)
  adapter = state["trainable"]
  return adapter.replace(projector=whitening.fold(adapter.projector))


def _start(
  part: Part,
  start: Adapter | None,
  loaded: LoadedModel,
  packers: Iterable[Packer],
  mixture: Mixture,
  path: pathlib.Path,
) -> tuple[Whitening, Adapter]:
  """The whitening, and the adapter that training starts from, with a projector of whitened features."""
  widened = None if start is None else widen(start.projector, loaded.config.vision.num_features)
  base = None if start is None or widened is start.projector else widened
  whitening, projector = aligned(path, loaded, packers, mixture, seed=part.seed, base=base)
  if start is not None:
    own = whitening.unfold(start.projector) if base is None else projector
    return whitening, start.replace(projector=own)
  decoder = loaded.model.params["language_model"]
  cross = init_cross(decoder, trained({"cross_attention_layers": loaded.config.text.cross_attention_layers}))
  lora = init_lora(jax.random.key(part.seed), decoder, part.rank, without=cross)
  return whitening, Adapter(projector, lora, cross)


def _gradients(loaded: LoadedModel, base: pathlib.Path, adapter: Adapter, options: Options) -> Gradients:
  if options.gradients == "torch":
    from experiments.demo_model.torch_gradients import TorchGradients

    return TorchGradients(base, adapter, dtype=options.dtype)
  dtype = checkpoint.DTYPES[options.dtype]
  network = Network(loaded.config, dtype, loaded.model.network.kernels)
  return jax_gradients(Model(jax.tree.map(lambda x: x.astype(dtype), loaded.model.params), network))


def make_step(
  gradients: Gradients, whitening: Whitening, optimizer: optax.GradientTransformation
) -> Callable[[State, Batch], tuple[State, Float[Array, ""], Float[Array, ""]]]:
  """A training step, with the whitening folded in: returns the new state, the loss and the share of right tokens."""

  @jax.jit
  def fold(adapter: Adapter) -> Adapter:
    return adapter.replace(projector=whitening.fold(adapter.projector))

  @jax.jit
  def update(state: State, grads: Adapter) -> State:
    (grads,) = jax.vjp(fold, state["trainable"])[1](grads)
    updates, optimizer_state = optimizer.update(grads, state["optimizer"], state["trainable"])
    adapter = optax.apply_updates(state["trainable"], updates)
    return {"trainable": adapter, "optimizer": optimizer_state, "step": state["step"] + 1}

  def step(state: State, batch: Batch) -> tuple[State, Array, Array]:
    loss, right, grads = gradients(fold(state["trainable"]), batch)
    return update(state, grads), loss, right

  return step


def make_optimizer(rates: Rates, num_steps: int) -> optax.GradientTransformation:
  """AdamW with warm-up and cosine decay; every part of the adapter has its own rate."""

  def adamw(peak: float) -> optax.GradientTransformation:
    return optax.adamw(optax.warmup_cosine_decay_schedule(0.0, peak, min(20, num_steps // 2), num_steps, 0.02 * peak))

  parts = {name: adamw(peak) for name, peak in rates._asdict().items()}
  return optax.chain(optax.clip_by_global_norm(1.0), optax.multi_transform(parts, Adapter(*parts)))
