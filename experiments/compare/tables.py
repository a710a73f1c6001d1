"""The figures of a comparison in Markdown, and the columns of its report."""

import collections
from collections.abc import Sequence

import numpy as np

from experiments.compare.comparison import BY_SIZE, BY_TYPE, Row
from experiments.compare.grid import method_names
from experiments.compare.report import Column
from experiments.shared import tabular
from experiments.shared.statistics import LEVEL, POWER, smallest_difference
from himap_jax.pruning.methods import METHODS

DIFFERENCES = ("difference", "beyond_random")
STAGES_SHOWN = 4
PRINTED = "tokens_in accuracy difference beyond_random beyond_random_p agreement all_token_flops prefill_time".split()


def groups_of(rows: Sequence[Row], prefix: str) -> list[str]:
  """Types or sizes of questions, by the prefix of their columns."""
  return [name.removeprefix(prefix) for name in rows[0] if name.startswith(prefix)]


def readable_columns(rows: Sequence[Row]) -> list[Column]:
  """The columns of the report's table; that of errors only if there are any."""
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
    Column("beyond_random_p", "p, corrected", "p"),
    *(Column(f"{BY_TYPE}{type}", type, "percent") for type in groups_of(rows, BY_TYPE)),
    *(Column(f"{BY_SIZE}{size}", f"size {size}", "percent") for size in groups_of(rows, BY_SIZE)),
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
  """Rows with intervals as text and long lists of stages shortened."""
  readable = [dict(row) for row in rows]
  for row in readable:
    for name in {"accuracy", "agreement", *DIFFERENCES} & row.keys():
      row[f"{name}_interval"] = " to ".join(_percent(row[f"{name}_{end}"], name) for end in ("low", "high"))
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
  if value is None or column.kind == "text":
    return value or ""
  if column.kind == "p":
    return f"{value:.3f}"
  return _percent(value, column.name) if column.kind == "percent" else f"{value:.1f}".removesuffix(".0")


def markdown(rows: Sequence[Row], columns: Sequence[Column]) -> str:
  """The readable table; a note replaces the layers."""
  noted = [row | {"prune_layers": row.get("note") or row.get("prune_layers")} for row in readable_rows(rows)]
  lines = tabular.markdown([column.label for column in columns], [[_text(row, c) for c in columns] for row in noted])
  return "\n".join(lines) + "\n"


def by_group(rows: Sequence[Row], prefix: str) -> str:
  """Accuracy of every type or size of question at every budget, by the prefix of their columns.

  Each budget has a row for each control, one for the mean of the methods that reach all budgets, so that all means are
  over the same methods, and one for every method there; no pruning and the question-only answers come first. A method
  with other layers or with RESTORE counts as another method.
  """
  by_budget = collections.defaultdict(dict)
  for row in rows:
    if row.get("budget") is not None and "accuracy" in row:
      by_budget[row["budget"]][row["method"]] = row
  methods = dict.fromkeys(name for own in by_budget.values() for name in own)
  controls = [name for name in methods if {METHODS[own].acts for own in method_names(name)} == {"anywhere"}]
  reached = list(by_budget.values())
  pruned = [name for name in (reached or [()])[0] if all(name in own for own in reached) and name not in controls]
  chosen = [("", row["label"], [row]) for row in rows[:2]]
  for budget, cells in by_budget.items():
    chosen += [(f"{budget:g}", name, [cells[name]]) for name in controls if name in cells]
    if pruned:
      chosen.append((f"{budget:g}", f"mean of {len(pruned)} methods", [cells[name] for name in pruned]))
    chosen += [(f"{budget:g}", name, [cells[name]]) for name in cells if name not in controls]
  names = [f"{prefix}{group}" for group in groups_of(rows, prefix)]
  means = [[*start, *(f"{np.mean([row[name] for row in own]):.1%}" for name in names)] for *start, own in chosen]
  return "\n".join(tabular.markdown(["budget", "", *groups_of(rows, prefix)], means)) + "\n"


def pairs(rows: Sequence[Row]) -> str:
  """Pairs of cells, as `Comparison.pairs` compares them."""
  heads = ["cell", "other cell", "questions", "accuracy", "of the other", "difference", "95% interval", "p, corrected"]
  table = []
  for row in rows:
    low, high = (f"{100 * row[f'difference_{end}']:+.1f}" for end in ("low", "high"))
    asked = f"{row['questions']} ({row['types'].replace('/', ', ')})" if row["types"] else str(row["questions"])
    shares = [f"{row[name]:.1%}" for name in ("accuracy", "its_accuracy")]
    table.append(
      [
        row["cell"],
        row["other"],
        asked,
        *shares,
        f"{100 * row['difference']:+.1f}",
        f"{low} to {high}",
        f"{row['p']:.3f}",
      ]
    )
  return "\n".join(tabular.markdown(heads, table)) + "\n"


def findings(rows: Sequence[Row]) -> str:
  """At every budget: the methods above random tokens and below them, at 5% together (Holm), and all others."""
  held = [row for row in rows if "beyond_random_p" in row]
  if not held:
    return "No method was compared with random tokens at the same budget.\n"
  mean_square = float(np.median([row["mean_square"] for row in held]))
  least = [smallest_difference(held[0]["questions"], mean_square, comparisons=n) for n in (1, len(held))]
  lines = [
    f"Accuracy against random tokens at the same budget, {held[0]['questions']} questions, {len(held)} comparisons. Random "
    "tokens have RESTORE or keep their positions where a method's do, if such a control was run. The statements 'above' "
    "and 'below' hold together at the level of 5% (sign-flip tests over pictures, corrected after Holm). The mean square "
    f"of a question's difference is {mean_square:.3f} in the median comparison; with that, a test alone finds a "
    f"difference of {100 * least[0]:.1f} points with a power of {POWER:.0%}, and after the correction one of "
    f"{100 * least[1]:.1f} points.",
    "",
  ]
  table = []
  for budget in dict.fromkeys(row["budget"] for row in held):
    parts = {"above": [], "below": [], "neither": []}
    for row in sorted((row for row in held if row["budget"] == budget), key=lambda row: -row["beyond_random"]):
      is_sure = row["beyond_random_p"] < 1 - LEVEL
      part = "neither" if not is_sure else "above" if row["beyond_random"] > 0 else "below"
      parts[part].append(f"{row['method']} {100 * row['beyond_random']:+.1f}")
    table.append([f"{budget:g}", *(", ".join(own) for own in parts.values())])
  heads = ["budget", "above random, in points", "below random", "neither"]
  return "\n".join([*lines, *tabular.markdown(heads, table)]) + "\n"
