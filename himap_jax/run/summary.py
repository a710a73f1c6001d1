"""Counts and times of a run, and the table that ends it."""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from himap_jax.engine.engine import Engine
from himap_jax.pruning.cost import costs
from himap_jax.pruning.schedule import Schedule
from himap_jax.pruning.sizes import ModelSizes

_COSTS = ("image_tokens", "decoder", "scoring", "prefill", "cache_bytes")


class Result(NamedTuple):
  """The outcome of a prompt: its output row and token counts.

  Attributes:
    num_tiles: its pictures, or tiles or patches of them.
    kept: image tokens after each stage.
    num_slots: slots of its prompt, padding included.
    num_padded_tiles: tiles, padding included.
  """

  row: dict[str, Any]
  num_new_tokens: int = 0
  num_tiles: int = 0
  num_image_tokens: int = 0
  num_text_tokens: int = 0
  kept: Sequence[int] = ()
  num_slots: int = 0
  num_padded_tiles: int = 0


@dataclasses.dataclass
class Summary:
  """Counts over all processes of a run.

  Attributes:
    num_skipped: rows that were already in the output.
    first_error: the id and the error of the first row that has one.
    answered: answered rows by their tiles, image tokens, text tokens, and image tokens kept at each stage.
    seconds: from the first prompt to the last row, including compilation.
  """

  num_errors: int = 0
  num_skipped: int = 0
  first_error: str = ""
  num_new_tokens: int = 0
  num_slots: int = 0
  num_padded_tiles: int = 0
  answered: collections.Counter[tuple] = dataclasses.field(default_factory=collections.Counter)
  seconds: float = 0.0

  @property
  def num_answered(self) -> int:
    return self.answered.total()

  @property
  def is_all_errors(self) -> bool:
    return self.num_errors > 0 and not self.num_answered + self.num_skipped

  def padding(self) -> str:
    """Shares of the prompts' slots and, if any, of the tiles that are padding."""
    slots = sum(count * (image + text) for (_, image, text, _), count in self.answered.items())
    tiles = sum(count * own for (own, *_), count in self.answered.items())
    shares = {"prompts' slots": 1 - slots / self.num_slots}
    if self.num_padded_tiles > tiles:
      shares["pictures' tiles or patches"] = 1 - tiles / self.num_padded_tiles
    return ", ".join(f"{share:.1%} of the {name}" for name, share in shares.items())

  def count(self, results: Iterable[Result]) -> None:
    for result in results:
      if result.row["error"] is not None:
        self.num_errors += 1
        self.first_error = self.first_error or _named(str(result.row["id"]), result.row["error"])
        continue
      self.num_new_tokens += result.num_new_tokens
      self.num_slots += result.num_slots
      self.num_padded_tiles += result.num_padded_tiles
      counts = (result.num_tiles, result.num_image_tokens, result.num_text_tokens)
      self.answered[*counts, tuple(result.kept)] += 1


def _named(row_id: str, error: str) -> str:
  """An error with its row's id, unless that is a label, `line:3`, with which the error begins as `line 3`."""
  return error if error.startswith(f"{row_id.replace(':', ' ')}: ") else f"{row_id}: {error}"


@dataclasses.dataclass(frozen=True)
class Report:
  """The table at the end of a run."""

  method: str
  schedule: Schedule
  sizes: ModelSizes
  num_devices: int

  def show(self, summary: Summary, engine: Engine | None) -> None:
    """Prints rows, times, rates, device-hours, image tokens of every stage, and FLOPs relative to no pruning.

    There is no engine if there was nothing to answer.
    """
    table = Table(show_header=False)
    answered, new_tokens = summary.num_answered, summary.num_new_tokens
    table.add_row("rows", f"{answered} answered, {summary.num_errors} errors, {summary.num_skipped} answered before")
    if summary.first_error:
      table.add_row("first error", Text(summary.first_error))
    if answered:
      seconds = engine.usage.prefill_seconds
      table.add_row("prefill", f"{seconds:.2f} s ({answered / seconds:.2f} rows/s)")
      seconds = engine.usage.decode_seconds
      table.add_row("decode", f"{seconds:.2f} s ({new_tokens / seconds:.1f} tokens/s, {new_tokens} tokens)")
      if engine.usage.slot_steps:
        table.add_row("slots in use", f"{engine.usage.row_steps / engine.usage.slot_steps:.1%} of the decoding steps")
      seconds = summary.seconds - engine.programs.seconds
      hours = seconds * self.num_devices / answered * 1e6 / 3600
      rates = f"{answered / seconds:.2f} rows/s; {hours:,.1f} device-hours for a million rows"
      table.add_row("in all", f"{seconds:.2f} s without compilation ({rates})")
    if engine is not None:
      table.add_row("compilation", f"{engine.programs.seconds:.2f} s, {engine.programs.num_programs} programs")
    table.add_row("method", self.method)
    if answered:
      table.add_row("image tokens", self._image_tokens(summary))
      table.add_row("padding", summary.padding())
      self._add_costs(table, summary)
    Console().print(table)

  def _image_tokens(self, summary: Summary) -> str:
    """Image tokens before pruning and after every stage, averaged over rows."""

    def mean(count: Callable[..., int]) -> str:
      return f"{sum(rows * count(*row) for row, rows in summary.answered.items()) / summary.num_answered:.4g}"

    texts = [mean(lambda tiles, image, text, kept: image)]
    for index, stage in enumerate(self.schedule.stages):
      texts.append(f"{mean(lambda *row, index=index: row[-1][index])} from layer {stage.layer} on")
    frozen = self.schedule.frozen_layers
    return ", ".join(texts + ([f"not updated in {len(frozen)} layers"] if frozen else []))

  def _add_costs(self, table: Table, summary: Summary) -> None:
    """Costs of all rows, each with its own keep counts, relative to no pruning."""
    own, plain, num_text_tokens = collections.Counter(), collections.Counter(), 0
    for (tiles, image, text, kept), count in summary.answered.items():
      for total, schedule in ((own, self.schedule.with_counts(kept)), (plain, Schedule())):
        cost = costs(self.sizes, schedule, image, text, num_pictures=tiles)
        total.update({name: count * getattr(cost, name) for name in _COSTS})
      num_text_tokens += count * text
    text = round(num_text_tokens / summary.num_answered)
    share = {name: f"{own[name] / plain[name]:.1%} of no pruning" for name in _COSTS if plain[name]}
    if "image_tokens" in share:
      table.add_row("FLOPs on image tokens (HiMAP Eq. 10)", share["image_tokens"])
    table.add_row(f"FLOPs on all tokens ({text} text tokens)", share["decoder"])
    table.add_row("FLOPs of choosing tokens", f"{own['scoring'] / own['prefill']:.2%} of this prefill")
    table.add_row("cache", share["cache_bytes"])
