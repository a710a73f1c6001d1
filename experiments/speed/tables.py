"""Tables of measurements: medians with their spread, and ratios with their targets."""

import dataclasses
import statistics
from collections.abc import Iterator
from typing import Any

from experiments.shared import geometries, tabular
from experiments.shared.study import Report
from experiments.speed.measure import Result
from experiments.speed.side import FIGURES, Scenario
from himap_jax.engine.accounting import model_sizes
from himap_jax.pruning import cost
from himap_jax.pruning.schedule import Schedule

Results = dict[Scenario, Result]

# Name; numerator and denominator, each a side and its figure; the target, an upper bound, and its geometries; and the
# number of new tokens for which the ratio is meant, None for any.
RATIOS = (
  ("our vanilla prefill ÷ transformers'", "none prefill", "transformers prefill", 1.0, "demo 7b", None),
  ("our decode per token ÷ transformers'", "none decode", "transformers decode", 0.85, "7b", None),
  (
    "our decode per token with int8 weights ÷ transformers'",
    "none/int8 decode",
    "transformers decode",
    0.5,
    "7b",
    None,
  ),
  ("our HiMAP example ÷ the authors' algorithm", "himap example", "authors example", 0.5, "7b", 1),
  ("our HiMAP example ÷ the authors' algorithm", "himap example", "authors example", 0.1, "7b", 32),
  (
    "our HiMAP example ÷ the authors' algorithm with a cache",
    "himap example",
    "authors_cache example",
    0.9,
    "7b",
    None,
  ),
)


SCENARIO_COLUMNS = {
  "geometry": "{geometry}",
  "instruction": "{num_instruction_tokens}",
  "batch": "{batch_size}",
  "new tokens": "{num_new_tokens}",
}
TARGET_COLUMNS = {
  "ratio": "{ratio}",
  **SCENARIO_COLUMNS,
  "measured": "{measured:.3f}",
  "at most": "{target:.3f}",
  "met": "{met}",
}
FIGURE_COLUMNS = {
  **SCENARIO_COLUMNS,
  "side": "{side}",
  **{f"{figure}, ms": f"{{{figure}}}" for figure in FIGURES},
  "compile and warm up, s": "{prepare:.1f}",
  "peak, GiB": "{peak:.1f}",
}


def seconds(result: dict[str, Any], figure: str) -> list[float]:
  """A figure by turn; empty if it was not measured."""
  return [turn[figure] for turn in result.get("turns", ()) if figure in turn]


def ratio(results: Result, above: str, below: str) -> float | None:
  """Median over turns of a side's figure, such as `himap prefill`, relative to another in the same turn."""
  sides_and_figures = (name.split() for name in (above, below))
  values = (seconds(results.get(side, {}), figure) for side, figure in sides_and_figures)
  pairs = list(zip(*values, strict=False))
  return statistics.median(a / b for a, b in pairs) if pairs else None


def flops_ratio(scenario: Scenario, method: str) -> float:
  """FLOPs of a method's decoder prefill, on all tokens and with the last token's logits, relative to no pruning."""
  config = geometries.model_of(scenario.geometry)
  num_tokens = geometries.num_image_tokens(config), scenario.num_text_tokens
  schedules = geometries.schedule_of(config, method), Schedule()
  sizes = model_sizes(config, geometries.image_shape(config))
  pruned, plain = (cost.costs(sizes, schedule, *num_tokens) for schedule in schedules)
  return (pruned.decoder + pruned.head) / (plain.decoder + plain.head)


def targets(all_results: Results) -> Iterator[dict[str, Any]]:
  for scenario, results in all_results.items():
    held = [
      ("HiMAP prefill ÷ our vanilla prefill", "himap prefill", "none prefill", 1.1 * flops_ratio(scenario, "himap")),
      ("scoring's share of a pruned prefill", "himap scoring", "himap prefill", 0.01),
    ]
    for *compared, target, places, num_new_tokens in RATIOS:
      if num_new_tokens in (None, scenario.num_new_tokens):
        held.append((*compared, target if scenario.geometry in places.split() else None))
    found = [(name, ratio(results, above, below), target) for name, above, below, target in held]
    for name in ("none", "himap"):
      result = results.get(name, {})
      if "decode_bytes" in result:
        label = f"bytes of a decoded token ÷ weights and cache ({name})"
        found.append((label, result["decode_bytes"] / result["decode_bytes_needed"], 1.15))
    for name, measured, target in found:
      if measured is not None:
        yield {"ratio": name, **dataclasses.asdict(scenario), "measured": measured, "target": target}


def figures(all_results: Results) -> Iterator[dict[str, Any]]:
  """Yields one row per scenario and side: medians, and half the range as the spread."""
  for scenario, results in all_results.items():
    for name, result in results.items():
      row: dict[str, Any] = {**dataclasses.asdict(scenario), "side": name, "turns": len(result.get("turns", ()))}
      for figure in FIGURES:
        values = seconds(result, figure)
        row[figure] = statistics.median(values) if values else None
        row[f"{figure}_spread"] = (max(values) - min(values)) / 2 if values else None
      row |= {key: result.get(key) for key in ("prepare", "peak_bytes", "cannot")}
      yield row


def report(all_results: Results, count: str) -> Report:
  """`figures.csv`, `targets.csv`, and both as Markdown; `count` describes the machine and the number of turns."""
  rows, held = list(figures(all_results)), list(targets(all_results))
  devices = {result["device"] for results in all_results.values() for result in results.values() if "device" in result}
  text = ["## Targets", "", *tabular.formatted(map(_held, sorted(held, key=lambda row: row["ratio"])), TARGET_COLUMNS)]
  text += ["", "## Figures", "", *tabular.formatted(map(_milliseconds, rows), FIGURE_COLUMNS)]
  return Report(f"{count}; devices: {', '.join(sorted(devices))}", text, {"figures": rows, "targets": held})


def _held(row: tabular.Row) -> tabular.Row:
  target = row["target"]
  return {**row, "met": None if target is None else "yes" if row["measured"] <= target else "no"}


def _milliseconds(row: tabular.Row) -> tabular.Row:
  """Figures in milliseconds with their spread; the reason why a side cannot run replaces the first."""
  shown = dict(row, peak=row["peak_bytes"] and row["peak_bytes"] / 2**30)
  for figure in FIGURES:
    if row[figure] is not None:
      shown[figure] = f"{1e3 * row[figure]:.4g} ± {1e3 * row[f'{figure}_spread']:.2g}"
  return shown | {FIGURES[0]: row["cannot"]} if row["cannot"] else shown
