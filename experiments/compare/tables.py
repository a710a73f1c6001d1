"""The figures of a comparison for people: Markdown, terminal, and the columns of the report."""

import collections
import pathlib
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.compare.comparison import BY_TYPE, Row
from experiments.compare.report import Column
from experiments.shared import tabular
from himap_jax.pruning.methods import METHODS

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
  readable = [dict(row) for row in rows]
  for row in readable:
    for name in {"accuracy", "agreement", *DIFFERENCES} & row.keys():
      low, high = row[f"{name}_low"], row[f"{name}_high"]
      row[f"{name}_interval"] = f"{_percent(low, name)} to {_percent(high, name)}"
    for name in ("prune_layers", "keep"):
      parts = (row.get(name) or "").split("/")
      if len(parts) > STAGES_SHOWN:
        row[name] = f"{parts[0]}/{parts[1]}/…/{parts[-1]} ({len(parts)})"
    if row.get("cache_bytes") is not None:
      row["cache_mib"] = row["cache_bytes"] / 2**20
  return readable


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
  """Writes the readable table; a note stands in place of the layers."""
  columns = readable_columns(rows)
  noted = [row | {"prune_layers": row.get("note") or row.get("prune_layers")} for row in readable_rows(rows)]
  lines = tabular.markdown([column.label for column in columns], [[_text(row, c) for c in columns] for row in noted])
  path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_types(path: pathlib.Path, rows: Sequence[Row]) -> None:
  """Writes the accuracy of every type of question at every budget.

  For every budget a row for each control, and one for the mean of the methods that reach all budgets, so that every mean is of
  the same methods; no pruning and the question-only answers stand above.
  """
  by_budget = collections.defaultdict(dict)
  for row in rows:
    if row.get("budget") is not None and "accuracy" in row:
      by_budget[row["budget"]][row["method"]] = row
  controls = [name for name, method in METHODS.items() if method.acts == "anywhere"]
  reached = [cells.keys() for cells in by_budget.values()]
  pruned = [name for name in (reached or [()])[0] if all(name in own for own in reached) and name not in controls]
  chosen = [("", row["label"], [row]) for row in rows[:2]]
  for budget, cells in by_budget.items():
    if pruned:
      chosen.append((f"{budget:g}", f"mean of {len(pruned)} methods", [cells[name] for name in pruned]))
    chosen += [(f"{budget:g}", name, [cells[name]]) for name in controls if name in cells]
  types = types_of(rows)
  means = [[f"{np.mean([row[BY_TYPE + type] for row in averaged]):.1%}" for type in types] for *_, averaged in chosen]
  lines = tabular.markdown(
    ["budget", "", *types], [[*start, *own] for (*start, _), own in zip(chosen, means, strict=True)]
  )
  path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def print_table(rows: Sequence[Row]) -> None:
  """Prints the main columns, and what could not be run below."""
  columns = {column.name: column for column in (Column("label", "", "text"), *readable_columns(rows))}
  table, console = Table(*PRINTED.values()), Console()
  for row in rows:
    if not row.get("note"):
      table.add_row(*(_text(row, columns[name]) for name in PRINTED))
  console.print(table)
  for row in rows:
    if row.get("note"):
      console.print(f"{row['label']}: {row['note']}", highlight=False, markup=False)
