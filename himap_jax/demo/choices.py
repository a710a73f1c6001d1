"""What a model lets one choose: its methods, and the layers and keep counts from which they start."""

import dataclasses

from himap_jax.engine.accounting import method_inputs
from himap_jax.errors import UserError
from himap_jax.pruning import methods
from himap_jax.pruning.config import PruningConfig
from himap_jax.pruning.methods import METHODS
from himap_jax.pruning.schedule import Stage
from himap_jax.run.asking import Asker

NOTHING = "none"


def before(asker: Asker) -> list[str]:
  """Methods before the decoder that read nothing that the model lacks; the first is none."""
  return _readable(asker, "inside")


def inside(asker: Asker) -> list[str]:
  """Such methods inside the decoder; the first is none."""
  return _readable(asker, "before")


def _readable(asker: Asker, elsewhere: str) -> list[str]:
  provided = set(method_inputs(asker.opened.config)["provides"])
  own = {name: method for name, method in METHODS.items() if method.acts != elsewhere and method.needs <= provided}
  return [NOTHING, *(name for name in own if name != NOTHING)]


def joined(first: str, second: str) -> str:
  """The method that is one before the decoder and one inside it; either may be none."""
  return "+".join(name for name in (first, second) if name != NOTHING) or NOTHING


def split(method: str) -> tuple[str, str]:
  """The method before the decoder and the one inside it; either may be none. Raises `UserError` if it is unknown."""
  first, *rest = methods.parse(method)
  if rest:
    return first, rest[0]
  return (NOTHING, first) if METHODS[first].acts == "inside" else (first, NOTHING)


def first_layer(method: str, stage: int) -> int | None:
  """The first layer that a stage of a method may precede; None if it may be at layer 0 alone."""
  first, second = split(method)
  if first == NOTHING:
    return 1
  if second != NOTHING:
    return 1 if stage else None
  return None if METHODS[first].acts == "before" else 0


def spelled_out(asker: Asker, pruning: PruningConfig) -> PruningConfig:
  """The same choice with the method's own layers, keep counts and parameters where it names none.

  Keep counts are image tokens if all pictures have equally many, else shares of a picture's.

  Raises:
    UserError: the model cannot run it, or it keeps counts where shares are needed.
  """
  schedule, number = asker.schedule(pruning), asker.processor.num_image_tokens

  def keep(stage: Stage) -> int | float:
    if number is not None:
      return stage.count(number)
    if isinstance(stage.keep, int):
      raise UserError(f"--keep={stage.keep}: pictures of this model differ in image tokens; keep a share, such as 25%")
    return max(0.001, round(stage.keep, 3))

  return dataclasses.replace(
    pruning,
    prune_layers=(*schedule.frozen_layers, *(stage.layer for stage in schedule.stages)) or None,
    keep=tuple(map(keep, schedule.stages)) or None,
    parameters=tuple(schedule.parameters),
  )
