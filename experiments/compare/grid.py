"""The grid: methods × budgets and explicit settings; each cell has a schedule, or the reason why it has none.

A budget is a mean number of image tokens per layer.
"""

import dataclasses
import math
import re
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.shared import kept
from himap_jax.errors import UserError
from himap_jax.pruning.config import PruningConfig
from himap_jax.pruning.method import NEEDS, Need
from himap_jax.pruning.methods import METHODS, parse
from himap_jax.pruning.schedule import Schedule
from himap_jax.run.flag_values import keep_count

REFERENCE = "none"
_SETTING = re.compile(
  r"(?P<method>[^@:]+?)(?P<option>\+restore|\+positions)?(@(?P<layers>\d+(/\d+)*))?(:(?P<keep>[\d.]+%?(/[\d.]+%?)*))?"
)


def method_names(method: str) -> list[str]:
  """The names in a cell's method, without options and layers."""
  return parse(parse_setting(method).method)


class Shape(NamedTuple):
  """Arguments of `PruningConfig.schedule`."""

  num_layers: int
  num_image_tokens: int
  provides: frozenset[Need] = frozenset(NEEDS)
  cross_layers: tuple[int, ...] = ()


def schedule_for_budget(pruning: PruningConfig, budget: float, shape: Shape, ranking: Sequence[int] | None) -> Schedule:
  """Builds a method's schedule for a mean number of image tokens per layer.

  A pruning method keeps its own shares times a common factor, at least one token and at most all, so that the mean
  number of image tokens that enter a layer is as near to the budget as possible; of two methods both are scaled. A
  freezing method instead updates that many image tokens per layer on average; `ranking` lists layers from least to most
  useful. Raises `UserError` for a budget that the method cannot reach, or a method that cannot be run.
  """
  method, whole = pruning.method, shape.num_image_tokens
  if not 0 < budget <= whole:
    raise UserError(f"a budget must be above 0 and at most the image's {whole} tokens, not {budget:g}")
  if any(METHODS[name].freezes for name in parse(method)):
    if pruning.prune_layers is not None:
      raise UserError(f"for a budget, {method!r} takes its layers from their ranking, not from its name")
    if ranking is None:
      raise UserError("a budget of a method that freezes layers needs their ranking: --shortv_ranking")
    lowest = whole * (shape.num_layers - len(ranking)) / shape.num_layers
    if lowest > budget:
      raise UserError(
        f"the ranking names {len(ranking)} layers; the lowest mean that they reach is {lowest:.1f} tokens"
      )
    frozen = tuple(ranking[: round(shape.num_layers * (1 - budget / whole))])
    return dataclasses.replace(pruning, prune_layers=frozen).schedule(*shape)
  own = pruning.schedule(*shape)
  if not own.stages:
    raise UserError(f"method {method!r} has nothing to scale to a budget")
  layers = tuple(stage.layer for stage in own.stages)
  keep = scale([stage.keep for stage in own.stages], layers, budget, shape)
  return dataclasses.replace(pruning, prune_layers=layers, keep=keep).schedule(*shape)


def scale(keep: Sequence[int], layers: Sequence[int], budget: float, shape: Shape) -> tuple[int, ...]:
  """Scales non-increasing keep counts to a mean: all by a factor, then the last one alone."""
  num_layers, num_image_tokens = shape.num_layers, shape.num_image_tokens
  spans = np.diff([0, *layers, num_layers])

  def counts(factor: float) -> np.ndarray:
    return np.clip(np.rint(factor * np.asarray(keep)), 1, num_image_tokens).astype(int)

  def mean(kept: np.ndarray) -> float:
    return float(spans @ [num_image_tokens, *kept]) / num_layers

  def adjust_last(kept: np.ndarray) -> np.ndarray:
    entering = [num_image_tokens, *kept[:-1]]
    wanted = (budget * num_layers - spans[:-1] @ entering) / spans[-1]
    return np.append(kept[:-1], int(np.clip(round(wanted), 1, entering[-1])))

  if mean(counts(0.0)) > budget:
    raise UserError(f"the lowest mean reachable is {mean(counts(0.0)):.1f} tokens")
  low, high = 0.0, num_image_tokens / min(keep)
  for _ in range(60):
    middle = (low + high) / 2
    low, high = (middle, high) if mean(counts(middle)) <= budget else (low, middle)
  candidates = [adjust_last(counts(factor)) for factor in (low, high)]
  return tuple(min(candidates, key=lambda kept: abs(mean(kept) - budget)).tolist())


@dataclasses.dataclass(frozen=True)
class Cell:
  """A method with a schedule, or a note on why its budget cannot be reached.

  The method's name ends with `+restore` or `+positions` where that is used, and then with `@` and layers where they are
  not its own; the label is unique and ends with the budget.
  """

  method: str
  label: str
  budget: float | None = None
  schedule: Schedule | None = None
  note: str | None = None

  @property
  def uses_chance(self) -> bool:
    return any(METHODS[name].uses_chance for name in method_names(self.method))

  @property
  def file_name(self) -> str:
    """A file name that changes with the schedule."""
    base_method, stages = self.method.partition("@")[0], [(stage.layer, stage.keep) for stage in self.schedule.stages]
    checksum = zlib.crc32(repr((base_method, stages, self.schedule.frozen_layers)).encode())
    return f"{kept.file_name(self.label)}.{checksum:08x}"


def check(methods: Sequence[str], budgets: Sequence[float], settings: Sequence[str]) -> None:
  """What can be checked without a model; raises `UserError` for an unknown method or an invalid budget or setting."""
  for name in methods:
    if ":" in name:
      raise UserError(f"{name!r} is not a method or method@layers, such as himap@1/4")
  for text in (*methods, *settings):
    parse_setting(text)
  for budget in budgets:
    if not 0 < budget < math.inf:
      raise UserError(f"a budget must be above 0, not {budget:g}")


def make_cells(
  shape: Shape, methods: Sequence[str], budgets: Sequence[float], settings: Sequence[str], ranking: Sequence[int] | None
) -> list[Cell]:
  """Methods such as `himap@1/4` at budgets, and settings such as `himap@2/8:288/72`; no pruning first.

  `+restore` after a method's name is RESTORE: `divprune+restore`, `himap+restore@2/8:288/72`; `+positions` keeps the
  positions of tokens before the decoder.

  `ranking` is as in `schedule_for_budget`. Raises `UserError` as `check`, or for a budget above the image's tokens.
  """
  check(methods, budgets, settings)
  explicit = [Cell(text.partition(":")[0], text, schedule=parse_setting(text).schedule(*shape)) for text in settings]
  if max(budgets, default=0) > shape.num_image_tokens:
    raise UserError(f"a budget must be at most the image's {shape.num_image_tokens} tokens, not {max(budgets):g}")
  cells = [Cell(REFERENCE, REFERENCE, schedule=Schedule())]
  for name in methods:
    pruning = parse_setting(name)
    for budget in budgets if pruning.method != REFERENCE else ():
      schedule = note = None
      try:
        schedule = schedule_for_budget(pruning, budget, shape, ranking)
      except UserError as error:
        note = str(error)
      cells.append(Cell(name, f"{name} {budget:g}", budget, schedule, note))
  return list({cell.label: cell for cell in (*cells, *explicit)}.values())


def check_any(cells: Sequence[Cell]) -> None:
  """Raises `UserError` if nothing can be compared with the first cell, no pruning."""
  if all(cell.schedule is None for cell in cells[1:]):
    raise UserError("; ".join(f"{cell.label}: {cell.note}" for cell in cells[1:]) or "no method is compared with none")


def parse_setting(text: str) -> PruningConfig:
  """A method, `method@layers` or `method@layers:keep`, with `+restore` or `+positions` after the method's name.

  Raises:
    UserError: for anything else.
  """
  match = _SETTING.fullmatch(text)
  if not match:
    raise UserError(f"{text!r} is not a method, method@layers or method@layers:keep, such as himap@2/8:288/72")
  method, layers, keep = match["method"], match["layers"], match["keep"]
  parse(method)
  try:
    return PruningConfig(
      method,
      layers and tuple(map(int, layers.split("/"))),
      keep and tuple(map(keep_count, keep.split("/"))),
      restore=match["option"] == "+restore",
      keep_positions=match["option"] == "+positions",
    )
  except ValueError as error:
    raise UserError(f"{text!r}: {error}") from error
