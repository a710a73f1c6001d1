"""One row a cell: every figure for machines (CSV), and the same for people (Markdown, terminal, report)."""

import collections
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments import tabular
from experiments.compare.grid import REFERENCE, Cell
from experiments.compare.report import Column
from experiments.question_sets import Question, is_right, score
from experiments.statistics import accuracy_by_type, resample, with_interval
from himap_jax import flops
from himap_jax.config import LlavaConfig
from himap_jax.methods import METHODS
from himap_jax.schedule import Schedule

QUESTION_ONLY = "question only"
CONTROL = "random"
BY_TYPE = "accuracy: "
DIFFERENCES = ("difference", "beyond_random")
STAGES_SHOWN = 4
PRINTED = {
  "label": "",
  "tokens_in": "tokens",
  "accuracy": "accuracy",
  "difference": "to none",
  "agreement": "agrees",
  "all_token_flops": "FLOPs",
  "prefill_time": "prefill",
}

Row = dict[str, Any]


def make_rows(
  cells: Sequence[Cell],
  answers: Mapping[str, Mapping[str, Mapping[str, Any]]],
  timings: Mapping[str, Mapping[str, Any]],
  questions: Sequence[Question],
  config: LlavaConfig,
  *,
  num_image_tokens: int,
  num_text_tokens: int,
  bytes_per_value: int,
  seed: int,
) -> list[Row]:
  """Every figure of every cell, and a row for what can be answered without the picture.

  Args:
    cells: no pruning first.
    answers: label of a cell that has run, no pruning first → id → output row.
    timings: label → what `timing.measure` gives, or nothing.
    questions: what was asked.
    config: the model.
    num_image_tokens: before pruning.
    num_text_tokens: of the prompts on average.
    bytes_per_value: of the cache.
    seed: of the bootstrap.
  """
  given = {label: [own[question.id]["answer"] for question in questions] for label, own in answers.items()}
  budgets = {cell.label: cell.budget for cell in cells if cell.label in given}
  controls = {cell.budget: cell.label for cell in cells if cell.method == CONTROL and cell.label in given}
  figures = _accuracies(
    given | {QUESTION_ONLY: [question.guess for question in questions]},
    questions,
    {label: controls[budget] for label, budget in budgets.items() if budget in controls},
    seed=seed,
  )
  sizes = {
    "num_image_tokens": num_image_tokens,
    "num_text_tokens": num_text_tokens,
    "bytes_per_value": bytes_per_value,
  }
  plain = flops.costs(config, Schedule(), **sizes)
  rows = []
  for cell in cells:
    row = {"method": cell.method, "label": cell.label, "budget": cell.budget, "note": cell.note}
    if cell.schedule is not None:
      own = flops.costs(config, cell.schedule, **sizes)
      row |= _tokens(cell.schedule, own, config.text.num_hidden_layers)
      row |= figures[cell.label] | _costs(own, plain) | _times(timings[cell.label])
    rows.append(row)
  rows.insert(1, {"method": QUESTION_ONLY, "label": QUESTION_ONLY} | figures[QUESTION_ONLY])
  return rows


def _accuracies(
  given: Mapping[str, Sequence[str | None]],
  questions: Sequence[Question],
  control_of: Mapping[str, str],
  *,
  seed: int,
) -> dict[str, Row]:
  """Accuracy of every label, its difference to no pruning, and to the control where it has one."""
  labels = list(given)
  right = np.array([[score(a, q.answer) for a, q in zip(own, questions, strict=True)] for own in given.values()])
  by_type = accuracy_by_type(right, [question.type for question in questions])
  same = np.array([[is_right(a, b) for a, b in zip(own, given[REFERENCE], strict=True)] for own in given.values()])
  resampled, agreed, mean = resample(right, seed=seed), resample(same, seed=seed), right.mean(axis=1)
  figures = {}
  for index, (label, own) in enumerate(given.items()):
    row = {
      "questions": len(questions),
      "errors": sum(answer is None for answer in own),
      **with_interval("accuracy", mean[index], resampled[:, index]),
    }
    references = {"difference": 0}
    if label in control_of:
      references["beyond_random"] = labels.index(control_of[label])
    for name, reference in references.items():
      row |= with_interval(name, mean[index] - mean[reference], resampled[:, index] - resampled[:, reference])
    row |= {f"{BY_TYPE}{type}": float(values[index]) for type, values in by_type.items()}
    row |= with_interval("agreement", same[index].mean(), agreed[:, index])
    figures[label] = row
  return figures


def _tokens(schedule: Schedule, own: flops.Costs, num_layers: int) -> Row:
  updated = own.mean_tokens_in * (1 - len(schedule.frozen_layers) / num_layers)
  layers = schedule.frozen_layers or [stage.layer for stage in schedule.stages]
  return {
    "prune_layers": "/".join(map(str, layers)) or None,
    "keep": "/".join(str(stage.keep) for stage in schedule.stages) or None,
    "tokens_in": own.mean_tokens_in,
    "tokens_out": own.mean_tokens_out,
    "tokens_updated": updated,
  }


def _costs(own: flops.Costs, plain: flops.Costs) -> Row:
  return {
    "image_token_flops": own.image_tokens / plain.image_tokens,
    "all_token_flops": (own.decoder + own.scoring) / plain.decoder,
    "scoring_share": own.scoring / own.prefill,
    "cache": own.cache_bytes / plain.cache_bytes,
    "cache_bytes": own.cache_bytes,
  }


def _times(timing: Mapping[str, Any]) -> Row:
  return {
    "prefill_time": timing.get("prefill_ratio"),
    "decode_time": timing.get("decode_ratio"),
    "prefill_seconds": timing.get("prefill_seconds"),
    "decode_seconds": timing.get("decode_seconds"),
    "compile_seconds": timing.get("compile_seconds"),
  }


def types_of(rows: Sequence[Row]) -> list[str]:
  """The question types that the rows have accuracies of."""
  return [name.removeprefix(BY_TYPE) for name in rows[0] if name.startswith(BY_TYPE)]


def readable_columns(rows: Sequence[Row]) -> list[Column]:
  """The columns for people."""
  return [
    Column("method", "method", "text"),
    Column("budget", "budget", "number"),
    Column("prune_layers", "prune layers", "text"),
    Column("keep", "keeps", "text"),
    Column("tokens_in", "image tokens in", "number"),
    Column("tokens_out", "out", "number"),
    Column("tokens_updated", "updated", "number"),
    *([Column("errors", "errors", "number")] if any(row.get("errors") for row in rows) else []),
    Column("accuracy", "accuracy", "percent"),
    Column("accuracy_interval", "95% interval", "text"),
    Column("difference", "difference to none", "percent"),
    Column("difference_interval", "95% interval", "text"),
    Column("beyond_random", "difference to random", "percent"),
    Column("beyond_random_interval", "95% interval", "text"),
    *(Column(f"{BY_TYPE}{type}", type, "percent") for type in types_of(rows)),
    Column("agreement", "agrees with none", "percent"),
    Column("agreement_interval", "95% interval", "text"),
    Column("image_token_flops", "FLOPs, image tokens (Eq. 10)", "percent"),
    Column("all_token_flops", "FLOPs, all tokens and scoring", "percent"),
    Column("scoring_share", "scoring in prefill FLOPs", "percent"),
    Column("cache", "cache", "percent"),
    Column("cache_mib", "cache, MiB", "number"),
    Column("prefill_time", "prefill time", "percent"),
    Column("decode_time", "decode time", "percent"),
  ]


def readable_rows(rows: Sequence[Row]) -> list[Row]:
  """The rows for people: intervals as text, long lists of stages cut short."""
  return [_readable(row) for row in rows]


def _readable(row: Row) -> Row:
  out = dict(row)
  for name in ("accuracy", "agreement", *DIFFERENCES):
    if name in row:
      low, high = row[f"{name}_low"], row[f"{name}_high"]
      out[f"{name}_interval"] = f"{_percent(low, name)} to {_percent(high, name)}"
  for name in ("prune_layers", "keep"):
    parts = (row.get(name) or "").split("/")
    if len(parts) > STAGES_SHOWN:
      out[name] = f"{parts[0]}/{parts[1]}/…/{parts[-1]} ({len(parts)})"
  if row.get("cache_bytes") is not None:
    out["cache_mib"] = row["cache_bytes"] / 2**20
  return out


def _percent(value: float, name: str) -> str:
  return f"{value:+.1%}" if name in DIFFERENCES else f"{value:.1%}"


def _text(row: Row, column: Column) -> str:
  value = row.get(column.name)
  if value is None:
    return ""
  if column.kind == "percent":
    return _percent(value, column.name)
  return f"{value:.1f}".removesuffix(".0") if column.kind == "number" else str(value)


def write_markdown(path: pathlib.Path, rows: Sequence[Row]) -> None:
  """Writes the readable table."""
  columns = readable_columns(rows)
  cells = []
  for row in readable_rows(rows):
    cells.append([_text(row, column) for column in columns])
    if row.get("note"):
      cells[-1][2] = row["note"]
  lines = tabular.markdown([column.label for column in columns], cells)
  path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_types(path: pathlib.Path, rows: Sequence[Row]) -> None:
  """Writes what becomes of every type of question as tokens go.

  For every budget a row for each control, and one for the mean of the methods that reach all budgets, so that every mean is of
  the same methods; no pruning and the answers without the picture stand above.
  """
  types = types_of(rows)
  by_budget = collections.defaultdict(dict)
  for row in rows:
    if row.get("budget") is not None and "accuracy" in row:
      by_budget[row["budget"]][row["method"]] = row
  controls = [name for name in METHODS if METHODS[name].acts == "anywhere"]
  everywhere = [
    name for name in next(iter(by_budget.values()), {}) if all(name in cells for cells in by_budget.values())
  ]
  pruned = [name for name in everywhere if name not in controls]
  chosen = [("", row["label"], [row]) for row in rows[:2]]
  for budget, cells in by_budget.items():
    if pruned:
      chosen.append((f"{budget:g}", f"mean of {len(pruned)} methods", [cells[name] for name in pruned]))
    chosen += [(f"{budget:g}", name, [cells[name]]) for name in controls if name in cells]
  cells = []
  for budget, name, averaged in chosen:
    means = [np.mean([row[f"{BY_TYPE}{type}"] for row in averaged]) for type in types]
    cells.append([budget, name, *(f"{mean:.1%}" for mean in means)])
  lines = tabular.markdown(["budget", "", *types], cells)
  path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def print_table(rows: Sequence[Row]) -> None:
  """Prints the main columns, and what could not be run below."""
  kinds = {column.name: column for column in [Column("label", "", "text"), *readable_columns(rows)]}
  table = Table(*PRINTED.values())
  for row in rows:
    if not row.get("note"):
      table.add_row(*(_text(row, kinds[name]) for name in PRINTED))
  console = Console()
  console.print(table)
  for row in rows:
    if row.get("note"):
      console.print(f"{row['label']}: {row['note']}", highlight=False, markup=False)
