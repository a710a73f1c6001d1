"""The grid: methods × budgets and explicit settings, each a cell with a schedule or the reason why there is none."""

import dataclasses
import re
import zlib
from collections.abc import Sequence

from experiments.compare.budget import schedule_for_budget
from himap_jax import methods
from himap_jax.command import keep_counts
from himap_jax.schedule import Schedule

REFERENCE = "none"
_METHOD = re.compile(r"(?P<method>[^@:]+)(@(?P<layers>\d+(/\d+)*))?")
_SETTING = re.compile(_METHOD.pattern + r"(:(?P<keep>[\d.]+%?(/[\d.]+%?)*))?")


@dataclasses.dataclass(frozen=True)
class Cell:
  """One thing to run.

  Attributes:
    method: its name; with `@` and layers where they are not the method's own.
    label: unique in the grid; ends with the budget where there is one.
    budget: the average number of image tokens that was asked for, or None.
    schedule: what happens to the image tokens, or None where the budget cannot be reached.
    note: why there is no schedule.
  """

  method: str
  label: str
  budget: float | None = None
  schedule: Schedule | None = None
  note: str | None = None

  @property
  def family(self) -> str:
    """The method's name without layers."""
    return self.method.partition("@")[0]

  @property
  def file_name(self) -> str:
    """Names the schedule too: one that comes out differently is another file."""
    stages = [(stage.layer, stage.keep) for stage in self.schedule.stages]
    checksum = zlib.crc32(repr((self.family, stages, self.schedule.frozen_layers)).encode())
    return f"{re.sub(r'[^-+@%.=0-9a-z]', '-', self.label.replace(':', '='))}.{checksum:08x}"


def make_cells(
  names: Sequence[str],
  budgets: Sequence[float],
  settings: Sequence[str],
  *,
  num_layers: int,
  num_image_tokens: int,
  has_class_token: bool,
  ranking: Sequence[int] | None,
) -> list[Cell]:
  """The cells of a grid, no pruning first.

  Args:
    names: `method` or `method@layers`, as `himap@1/4`.
    budgets: average numbers of image tokens, for each of `names`.
    settings: `method`, `method@layers` or `method@layers:keep`, as `himap@2/8:288/72` or `fastv:25%`.
    num_layers: the decoder's layers.
    num_image_tokens: before pruning.
    has_class_token: whether the tower has a class token.
    ranking: layers from least to most useful, for a method that freezes.

  Raises:
    ValueError: a method or a setting that is not one, or a setting that the model cannot run.
  """
  sizes = {"num_layers": num_layers, "num_image_tokens": num_image_tokens, "has_class_token": has_class_token}
  cells = [Cell(REFERENCE, REFERENCE, schedule=Schedule())]
  for name in names:
    method, layers, _ = _parse(_METHOD, name)
    if method == REFERENCE:
      continue
    for budget in budgets:
      cell = Cell(name, f"{name} {budget:g}", budget)
      try:
        schedule = schedule_for_budget(method, budget, **sizes, prune_layers=layers, ranking=ranking)
        cells.append(dataclasses.replace(cell, schedule=schedule))
      except ValueError as error:
        cells.append(dataclasses.replace(cell, note=str(error)))
  for setting in settings:
    method, layers, keep = _parse(_SETTING, setting)
    schedule = methods.build_schedule(method, **sizes, prune_layers=layers, keep=keep)
    cells.append(Cell(setting.partition(":")[0], setting, schedule=schedule))
  return list({cell.label: cell for cell in cells}.values())


def _parse(pattern: re.Pattern[str], text: str) -> tuple[str, tuple[int, ...] | None, tuple[int | float, ...] | None]:
  match = pattern.fullmatch(text)
  if not match:
    raise ValueError(f"{text!r} is not a method, method@layers or method@layers:keep, as himap@2/8:288/72")
  parts = match.groupdict()
  methods.parse(parts["method"])
  layers, keep = parts["layers"], parts.get("keep")
  try:
    return (
      parts["method"],
      tuple(map(int, layers.split("/"))) if layers else None,
      keep_counts(keep) if keep else None,
    )
  except ValueError as error:
    raise ValueError(f"{text!r}: {error}") from error
