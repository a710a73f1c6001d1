"""A choice of pruning, and the schedule that it makes for a model."""

import dataclasses
import numbers
import sys
from collections.abc import Collection, Mapping
from typing import Any

from himap_jax.errors import UserError, check_is, check_whole
from himap_jax.pruning.method import NEEDS, Criterion, Method, Need
from himap_jax.pruning.methods import METHODS, parse
from himap_jax.pruning.schedule import Schedule, Stage


def build_schedule(
  method: str,
  *,
  num_layers: int,
  num_image_tokens: int | None = None,
  provides: Collection[Need] = frozenset(NEEDS),
  prune_layers: tuple[int, ...] | None = None,
  keep: tuple[int | float, ...] | None = None,
  parameters: Mapping[str, float] | None = None,
) -> Schedule:
  """Builds and checks a method's schedule for a model.

  Args:
    method: a name in `METHODS`, or two joined by `+`: one before the decoder, one inside.
    num_layers: of the decoder.
    num_image_tokens: of a prompt before pruning. If absent, the schedule is for prompts with any number of them: its
      shares stay shares, and counts are not checked; see `Schedule.at`.
    provides: what methods can read of the model, everything by default.
    prune_layers: layers to prune before, one per stage, 0 being before the decoder; for a method that freezes, layers
      in which image tokens are not updated. By default the method's own.
    keep: image tokens to keep at each stage: a count (int) or a share of the prompt's image tokens (float in (0, 1],
      rounded to the nearest count, at least one). By default the method's own; of two methods, the second one's shares are of
      what the first keeps.
    parameters: values of `Method.parameters`; absent ones take their defaults.

  Raises:
    UserError: an unknown method or parameter, a wrong number of layers or counts, or values that the model cannot run.
  """
  check_is("method", method, str, "the name of a method")
  _check_provided(method, provides)
  _check_numbers(prune_layers, keep)
  entries = _entries(method)
  values = _parameters(method, entries, parameters or {})
  if prune_layers is None:
    prune_layers = sum((_of_depth(entry.prune_layers, num_layers) for entry in entries), ())
    if len(entries) > 1 and list(prune_layers) != sorted(set(prune_layers)):
      layers = ", ".join(map(str, prune_layers))
      raise UserError(f"method {method!r} would prune before layers {layers} by default; name ascending prune_layers")
  if entries[0].freezes:
    if keep is not None:
      raise UserError(f"method {method!r} keeps every image token, so it takes no keep")
    schedule = Schedule(frozen_layers=tuple(sorted(map(int, prune_layers))), parameters=values)
  else:
    criteria = _criteria(method, entries, prune_layers)
    keep = _shares(entries, num_layers) if keep is None else keep
    if len(keep) != len(criteria):
      raise UserError(f"method {method!r} has {len(criteria)} stages, but keep has {len(keep)} values")
    _check_keep(keep)
    counts = (value if isinstance(value, float) else int(value) for value in keep)
    stages = tuple(Stage(*stage) for stage in zip(map(int, prune_layers), counts, criteria, strict=True))
    schedule = Schedule(stages, parameters=values)
  if num_image_tokens is not None:
    return schedule.at(num_layers, num_image_tokens)
  schedule.segments(num_layers, num_image_tokens=1)
  return schedule


@dataclasses.dataclass(frozen=True)
class PruningConfig:
  """A choice of pruning for any model: arguments of `build_schedule`, with parameters as pairs of name and value.

  Attributes:
    restore, keep_positions: see `Schedule`.
  """

  method: str = "himap"
  prune_layers: tuple[int, ...] | None = None
  keep: tuple[int | float, ...] | None = None
  parameters: tuple[tuple[str, float], ...] = ()
  restore: bool = False
  keep_positions: bool = False

  @property
  def label(self) -> str:
    """The method's name for people."""
    return self.method + "+positions" * self.keep_positions + "+restore" * self.restore

  def schedule(
    self,
    num_layers: int,
    num_image_tokens: int | None = None,
    provides: Collection[Need] = frozenset(NEEDS),
    cross_layers: tuple[int, ...] = (),
  ) -> Schedule:
    """The schedule for a model; other arguments and errors as in `build_schedule`.

    Args:
      cross_layers: layers in which the text reads image tokens, if these are no part of the decoder's sequence.
    """
    model = dict(num_layers=num_layers, num_image_tokens=num_image_tokens, provides=provides)
    own = dict(prune_layers=self.prune_layers, keep=self.keep, parameters=dict(self.parameters))
    schedule = build_schedule(self.method, **model, **own)
    if cross_layers:
      _check_cross_layers(self.method, schedule, cross_layers)
    if self.restore:
      _check_restore(self.method, schedule, cross_layers)
    if self.keep_positions:
      _check_positions(self.method, schedule, cross_layers)
    return dataclasses.replace(schedule, restore=self.restore, keep_positions=self.keep_positions)


def _check_provided(method: str, provides: Collection[Need]) -> None:
  """Raises `UserError`, which lists the methods that work, if the model has not what a method reads."""
  for name in parse(method):
    lacking = [need for need in NEEDS if need in METHODS[name].needs and need not in provides]
    if lacking:
      others = [known for known, entry in METHODS.items() if entry.needs <= set(provides)]
      raise UserError(f"method {name!r} {NEEDS[lacking[0]]}; methods that work: {', '.join(others)}")


def _entries(method: str) -> list[Method]:
  """The method, or the two that combine."""
  first, *rest = entries = [METHODS[name] for name in parse(method)]
  can_be = first.criteria and first.acts != "inside" and all(e.criteria and e.acts != "before" for e in rest)
  if len(rest) > 1 or (rest and not can_be):
    before = [name for name, entry in METHODS.items() if entry.criteria and entry.acts != "inside"]
    raise UserError(
      f"method {method!r}: two methods combine as one that acts before the decoder ({', '.join(before)}) + one that "
      "prunes inside it"
    )
  return entries


def _parameters(method: str, entries: list[Method], given: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
  values = {name: value for entry in entries for name, value in entry.parameters.items()}
  for name in given:
    if name not in values:
      raise UserError(f"method {method!r} has no parameter {name!r}; it has: {', '.join(values) or 'none'}")
  for name, value in given.items():
    check_is(f"the parameter {name}", value, numbers.Real, "a number")
  values |= given
  for entry in entries:
    entry.check(values)
  return tuple(sorted(values.items()))


def _criteria(method: str, entries: list[Method], prune_layers: tuple[int, ...]) -> list[Criterion]:
  """The criterion of every stage; a method's single criterion serves any number of stages."""
  first, own = list(entries[0].criteria) if len(entries) > 1 else [], list(entries[-1].criteria)
  num_own = len(prune_layers) - len(first)
  if (len(own) != 1 and num_own != len(own)) or num_own < len(own):
    raise UserError(
      f"method {method!r} has {len(first) + len(own)} stages, but prune_layers has {len(prune_layers)} values"
    )
  for index, layer in enumerate(prune_layers):
    acts = entries[0 if index == 0 else -1].acts
    if acts == "before" and layer != 0:
      raise UserError(f"method {method!r} acts before the decoder: its prune_layers can only be 0, not {layer}")
    if acts == "inside" and layer == 0:
      raise UserError(f"method {method!r} cannot prune before layer 0: it needs the attention of the previous layer")
  return first + (own if len(own) == num_own else own * num_own)


def _check_cross_layers(method: str, schedule: Schedule, cross_layers: tuple[int, ...]) -> None:
  """Raises `UserError` if a stage reads attention of layers that do not read image tokens.

  It reads that of the last cross layer between the stage before and itself, or of the next layer.
  """
  entries, first = _entries(method), 0
  for index, stage in enumerate(schedule.stages):
    entry = entries[0 if index == 0 else -1]
    last = stage.layer - 1
    if entry.reads_next_layer:
      first = last = stage.layer
    if entry.acts == "inside" and not any(first <= layer <= last for layer in cross_layers):
      raise UserError(
        f"method {method!r} cannot prune before layer {stage.layer}: it reads the attention of layers {first} to {last}, "
        f"and this model reads image tokens in layers {', '.join(map(str, cross_layers))}"
      )
    first = stage.layer


def _check_restore(method: str, schedule: Schedule, cross_layers: tuple[int, ...]) -> None:
  """Raises `UserError` where there is no attention that RESTORE could calibrate."""
  if cross_layers:
    raise UserError(
      "RESTORE calibrates attention to image tokens of the decoder's sequence, and this model's text reads image tokens "
      "by cross-attention alone"
    )
  if not schedule.stages:
    raise UserError(f"RESTORE makes up for image tokens that were removed, and method {method!r} removes none")


def _check_positions(method: str, schedule: Schedule, cross_layers: tuple[int, ...]) -> None:
  """Raises `UserError` where image tokens have no positions that could be kept, or keep them anyway."""
  if cross_layers:
    raise UserError("image tokens have no positions to keep: this model's text reads them by cross-attention alone")
  if not schedule.stages or schedule.stages[0].layer > 0:
    raise UserError(f"positions change only where tokens are removed before the decoder; method {method!r} keeps them")


def _shares(entries: list[Method], num_layers: int) -> tuple[float, ...]:
  """The methods' own shares of the prompt's image tokens after each stage."""
  shares = []
  for entry in entries:
    entering = shares[-1] if shares else 1.0
    shares += [share * entering for share in _of_depth(entry.keep, num_layers)]
  return tuple(shares)


def _of_depth(value: Any, num_layers: int) -> tuple:
  return value(num_layers) if callable(value) else value


def _check_numbers(prune_layers: Any, keep: Any) -> None:
  """Raises `UserError` unless layers are whole numbers, and what to keep whole numbers or shares, a list of each."""
  for name, values in (("prune_layers", prune_layers), ("keep", keep)):
    if values is not None:
      check_is(name, values, (tuple, list, range), "a list of numbers")
  for layer in prune_layers or ():
    check_whole("a layer to prune before", layer, least=-sys.maxsize)
  for value in keep or ():
    if not isinstance(value, float):
      check_whole("a count of image tokens to keep", value, least=-sys.maxsize)


def _check_keep(keep: tuple[int | float, ...]) -> None:
  for value in keep:
    if isinstance(value, float) and not 0 < value <= 1:
      raise UserError(f"a share of image tokens to keep must be above 0% and at most 100%, not {value:.4%}")
    if not isinstance(value, float) and value < 1:
      raise UserError(f"cannot keep {value} image tokens; at least one must remain")
