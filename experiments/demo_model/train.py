"""Trains a demo model: a projector and low-rank updates of the language model, on scenes, details and easy-VQA.

    python -m experiments.demo_model.train --workdir=… --adapter=checkpoints_convert/demo/adapter.safetensors

In `--model=demo_cross`, cross-attention layers are trained, too (`checkpoints_convert.demo.cross`). The DINOv2 tower and SmolLM2 stay frozen. A training sequence holds one image and several independent questions about
it:

    [ system, image ][ question 1, answer 1 ][ question 2, answer 2 ] … padding

Each question attends to the shared prefix and to itself, and its positions continue from the prefix, so that every
question is trained exactly as it is asked at inference, alone. The projector is trained on whitened features (see
`align`); the whitening is folded into the exported projector. Training begins at a low image resolution, where steps
are cheap, and ends at the demo's own. Repeating an interrupted command resumes from the last checkpoint in the work
directory.
"""

import importlib.util
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from jaxtyping import Array, Float
from orbax.checkpoint import v1 as ocp

from checkpoints_convert.demo.assemble import ADAPTERS, FEATURE_LAYERS, assemble
from checkpoints_convert.demo.cross import trained
from checkpoints_convert.demo.packages import sha256_of
from checkpoints_convert.source import read_json
from experiments.demo_model.adapter import Adapter, Whitening, init_cross, init_lora, widen
from experiments.demo_model.align import aligned
from experiments.demo_model.data import Mixture
from experiments.demo_model.gradients import Gradients, jax_gradients
from experiments.demo_model.packing import Batch, Packer
from experiments.shared import study
from himap_jax import checkpoint
from himap_jax.errors import UserError
from himap_jax.model.network import Model, Network
from himap_jax.run import command
from himap_jax.run.progress import Progress

flags.DEFINE_string("workdir", None, "Directory of checkpoints, to resume from.", required=True)
_MODEL = flags.DEFINE_enum("model", "demo", list(ADAPTERS), "Which demo model to train.")
_ADAPTER = flags.DEFINE_string("adapter", None, "Where to write the trained parameters (safetensors).", required=True)
_INIT_ADAPTER = flags.DEFINE_string("init_adapter", None, "An adapter to start from; from scratch if absent.")
_STAGES = flags.DEFINE_list(
  "stages",
  ["168:840:3:208", "336:200:1:208"],
  "Stages as image_size:steps:images:question_slots: pixels, steps, images per step, text tokens per image.",
)
_SCENE_SHARE = flags.DEFINE_float("scene_share", 0.75, "Share of pictures that are scenes.")
_DETAIL_SHARE = flags.DEFINE_float(
  "detail_share", 0.0, "Share of pictures that are details; the others are easy-VQA's."
)
_DRILL_SHARE = flags.DEFINE_float(
  "drill_share", 0.0, "Share of details that are drills: many small things and signs, all asked about."
)
_BUSY_SHARE = flags.DEFINE_float(
  "busy_share", 0.0, "Share of drills that are busy scenes instead, with questions worded as in tests."
)
_RANK = flags.DEFINE_integer("rank", 16, "Rank of the low-rank updates.")
_PROJECTOR_RATE = flags.DEFINE_float("projector_rate", 5e-4, "Peak learning rate of the projector.")
_LORA_RATE = flags.DEFINE_float("lora_rate", 8e-4, "Peak learning rate of the low-rank updates.")
_CROSS_RATE = flags.DEFINE_float("cross_rate", 5e-4, "Peak learning rate of fully trained cross-attention parameters.")
_SHARES = (_SCENE_SHARE, _DETAIL_SHARE, _DRILL_SHARE, _BUSY_SHARE)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of initialisation and data order.")
_DTYPE = flags.DEFINE_enum(
  "dtype", "bfloat16", sorted(command.DTYPES), "Dtype of the model; trained parameters are float32."
)
_GRADIENTS = flags.DEFINE_enum(
  "gradients", "jax", ["jax", "torch"], "What computes gradients; torch is faster on CPUs with AMX."
)
_SAVE_EVERY = flags.DEFINE_integer("save_every", 40, "Steps between checkpoints.")

State = dict[str, Any]  # the adapter being trained, the optimizer's state and the number of steps done


class Stage(NamedTuple):
  """Steps at one resolution, each on a number of images."""

  image_size: int
  steps: int
  images: int
  question_slots: int


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


def make_optimizer(num_steps: int) -> optax.GradientTransformation:
  """AdamW with warm-up and cosine decay; every part of the adapter has its own rate."""

  def adamw(peak: float) -> optax.GradientTransformation:
    return optax.adamw(optax.warmup_cosine_decay_schedule(0.0, peak, min(20, num_steps // 2), num_steps, 0.02 * peak))

  rates = {"projector": _PROJECTOR_RATE, "lora": _LORA_RATE, "cross": _CROSS_RATE}
  parts = {name: adamw(rate.value) for name, rate in rates.items()}
  return optax.chain(optax.clip_by_global_norm(1.0), optax.multi_transform(parts, Adapter(*parts)))


def run() -> int:
  if _GRADIENTS.value == "torch":
    check_torch()
  stages, seed = command.numbers(_STAGES, _stage, "such as 168:840:3:208"), _SEED.value
  workdir = study.directory("workdir").absolute()
  base = assemble(workdir / "base", _MODEL.value, cache_dir=checkpoint.default_cache_dir(), adapter=None)
  loaded = checkpoint.load(str(base), dtype=jnp.float32)
  packers = {stage: Packer(loaded, stage.image_size, stage.question_slots) for stage in stages}
  check_settings(workdir, stages)
  mixture = Mixture(**{flag.name: flag.value for flag in _SHARES})
  directory, base_projector = workdir / "checkpoints", None
  if _INIT_ADAPTER.value:
    adapter = Adapter.read(_INIT_ADAPTER.value)
    widened = widen(adapter.projector, loaded.config.vision.num_features)
    base_projector = None if widened is adapter.projector else widened
  whitening, projector = aligned(directory / "start", loaded, packers.values(), mixture, seed=seed, base=base_projector)
  if _INIT_ADAPTER.value:
    own = projector if base_projector is not None else whitening.unfold(adapter.projector)
    adapter = adapter.replace(projector=own)
  else:
    decoder = loaded.model.params["language_model"]
    cross = init_cross(decoder, trained(read_json(base / "config.json")["text_config"]))
    adapter = Adapter(projector, init_lora(jax.random.key(seed), decoder, _RANK.value, without=cross), cross)
  plan = [stage for stage in stages for _ in range(stage.steps)]
  optimizer, dtype = make_optimizer(len(plan)), command.DTYPES[_DTYPE.value]
  state = {"trainable": adapter, "optimizer": optimizer.init(adapter), "step": jnp.int32(0)}
  if _GRADIENTS.value == "torch":
    from experiments.demo_model.torch_gradients import TorchGradients

    gradients = TorchGradients(base, adapter, dtype=_DTYPE.value)
  else:
    network = Network(loaded.config, dtype, loaded.model.network.kernels)
    gradients = jax_gradients(Model(jax.tree.map(lambda x: x.astype(dtype), loaded.model.params), network))
  step = make_step(gradients, whitening, optimizer)

  def export() -> None:
    adapter = state["trainable"]
    adapter.replace(projector=whitening.fold(adapter.projector)).save(pathlib.Path(_ADAPTER.value))

  policy = ocp.training.preservation_policies.LatestN(2)
  with ocp.training.Checkpointer(directory, preservation_policy=policy) as checkpointer:
    if checkpointer.latest is not None:
      state = checkpointer.load(checkpointer.latest.step, state)
    first_step = int(state["step"])
    recent = []
    with Progress(len(plan) - first_step, "step", "training") as progress:
      for index, stage in enumerate(plan[first_step:], start=first_step + 1):
        batch = packers[stage].pack(mixture.draw(stage.images, seed=(seed, index - 1)))
        state, loss, right = step(state, batch)
        recent = [*recent[-19:], (float(loss), float(right))]
        progress.update()
        if index % _SAVE_EVERY.value == 0 or index == len(plan):
          checkpointer.save(index, state)
          export()
          loss, right = np.mean(recent, axis=0)
          print(f"step {index}: {stage.image_size} px, loss {loss:.3f}, right {right:.3f}", flush=True)
  export()
  return 0


def check_torch() -> None:
  """Raises `UserError` if PyTorch cannot compute the gradients."""
  if _MODEL.value != "demo":
    raise UserError("--gradients=torch: those of cross-attention are computed in JAX alone")
  if importlib.util.find_spec("torch") is None:
    raise UserError("--gradients=torch needs PyTorch; pip install -e '.[pickled]'")


def check_settings(workdir: pathlib.Path, stages: Sequence[Stage]) -> None:
  """Raises `UserError` if the work directory holds the training of another adapter, plan or seed."""
  flags_of = (
    _MODEL,
    *_SHARES,
    _RANK,
    _PROJECTOR_RATE,
    _LORA_RATE,
    _CROSS_RATE,
    _SEED,
    _DTYPE,
  )
  start = None if _INIT_ADAPTER.value is None else sha256_of(pathlib.Path(_INIT_ADAPTER.value))
  settings = {flag.name: flag.value for flag in flags_of} | {"stages": list(map(list, stages)), "init_adapter": start}
  settings |= {"feature_layers": list(FEATURE_LAYERS[_MODEL.value])}
  command.check_settings(workdir / "settings.json", settings, "use another --workdir")


def _stage(text: str) -> Stage:
  image_size, steps, images, question_slots = map(int, text.split(":"))
  return Stage(image_size, steps, images, question_slots)


if __name__ == "__main__":
  command.start_action("experiments.demo_model.train", run)
