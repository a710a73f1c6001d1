"""From what was measured to tables: medians with their spread, and the ratios that matter."""

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from experiments.shared import geometries, tabular
from experiments.shared.study import Report
from experiments.speed.side import FIGURES, Scenario
from experiments.speed.study import result_path
from himap_jax.engine.accounting import model_sizes
from himap_jax.pruning import cost
from himap_jax.pruning.schedule import Schedule

Results = dict[Scenario, dict[str, dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Ratio:
  """A figure of one side in units of another's, turn by turn.

  Attributes:
    name: what is compared.
    target: the largest value that we hold to, at `geometries`; elsewhere the ratio has no target.
    figure: which figure.
    side: whose, above the line.
    reference: whose, below it.
    geometries: where it has its target.
    num_new_tokens: outputs it is meant for; any when None.
  """

  name: str
  target: float
  figure: str
  side: str
  reference: str
  geometries: tuple[str, ...] = ("7b",)
  num_new_tokens: int | None = None


RATIOS = (
  Ratio("our vanilla prefill ÷ transformers'", 1.0, "prefill", "none", "transformers", ("demo", "7b")),
  Ratio("our decode per token ÷ transformers'", 0.85, "decode", "none", "transformers"),
  Ratio("our decode per token with int8 weights ÷ transformers'", 0.5, "decode", "none/int8", "transformers"),
  Ratio("our HiMAP example ÷ the authors' algorithm", 0.5, "example", "himap", "authors", num_new_tokens=1),
  Ratio("our HiMAP example ÷ the authors' algorithm", 0.1, "example", "himap", "authors", num_new_tokens=32),
  Ratio("our HiMAP example ÷ the authors' algorithm with a cache", 0.9, "example", "himap", "authors_cache"),
)


def read(workdir: pathlib.Path, scenarios: Sequence[Scenario]) -> Results:
  """What has been measured of the scenarios."""
  paths = {scenario: result_path(workdir, scenario) for scenario in scenarios}
  return {scenario: json.loads(path.read_text()) for scenario, path in paths.items() if path.exists()}


def seconds(result: dict[str, Any], figure: str) -> list[float]:
  """A figure, turn by turn; empty where it was not measured."""
  return [turn[figure] for turn in result.get("turns", ()) if figure in turn]


def ratio(results: dict[str, dict[str, Any]], figure: str, side: str, reference: str) -> float | None:
  """The median over turns of one side's seconds in units of another's in the same turn."""
  pairs = list(zip(seconds(results.get(side, {}), figure), seconds(results.get(reference, {}), figure), strict=False))
  return statistics.median(a / b for a, b in pairs) if pairs else None


def flops_ratio(scenario: Scenario, method: str) -> float:
  """What a method should take: the decoder's prefill on all tokens in units of no pruning, the last token's logits included."""
  config = geometries.model_of(scenario.geometry)
  num_tokens = geometries.num_image_tokens(config), scenario.num_text_tokens
  schedules = geometries.schedule_of(config, method), Schedule()
  pruned, plain = (cost.costs(model_sizes(config), schedule, *num_tokens) for schedule in schedules)
  return (pruned.decoder + pruned.head) / (plain.decoder + plain.head)


def targets(all_results: Results) -> Iterator[dict[str, Any]]:
  """Every ratio that we hold to a target, scenario by scenario."""
  for scenario, results in all_results.items():
    where = dataclasses.asdict(scenario)
    pruned = ratio(results, "prefill", "himap", "none")
    if pruned is not None:
      target = 1.1 * flops_ratio(scenario, "himap")
      yield {"ratio": "HiMAP prefill ÷ our vanilla prefill", **where, "measured": pruned, "target": target}
    scoring, prefill = (seconds(results.get("himap", {}), figure) for figure in ("scoring", "prefill"))
    if scoring:
      share = statistics.median(a / b for a, b in zip(scoring, prefill, strict=True))
      yield {"ratio": "scoring's share of a pruned prefill", **where, "measured": share, "target": 0.01}
    for held in RATIOS:
      measured = ratio(results, held.figure, held.side, held.reference)
      if measured is not None and held.num_new_tokens in (None, scenario.num_new_tokens):
        target = held.target if scenario.geometry in held.geometries else None
        yield {"ratio": held.name, **where, "measured": measured, "target": target}
    for name in ("none", "himap"):
      result = results.get(name, {})
      if "decode_bytes" in result:
        measured = result["decode_bytes"] / result["decode_bytes_needed"]
        label = f"bytes of a decoded token ÷ weights and cache ({name})"
        yield {"ratio": label, **where, "measured": measured, "target": 1.15}


def figures(all_results: Results) -> Iterator[dict[str, Any]]:
  """One row a scenario and side: medians, and half the distance between the extremes as the spread."""
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
  """`figures.csv`, `targets.csv`, and both as Markdown; `count` says how often it was measured, and on what."""
  rows, held = list(figures(all_results)), list(targets(all_results))
  devices = {result["device"] for results in all_results.values() for result in results.values() if "device" in result}
  text = ["## Targets", "", *tabular.formatted(map(_held, sorted(held, key=lambda row: row["ratio"])), TARGET_COLUMNS)]
  text += ["", "## Figures", "", *tabular.formatted(map(_milliseconds, rows), FIGURE_COLUMNS)]
  return Report(f"{count}; devices: {', '.join(sorted(devices))}", text, {"figures": rows, "targets": held})


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


def _held(row: tabular.Row) -> tabular.Row:
  """A target, with whether it is met."""
  target = row["target"]
  return {**row, "met": None if target is None else "yes" if row["measured"] <= target else "no"}


def _milliseconds(row: tabular.Row) -> tabular.Row:
  """Figures in milliseconds with their spread; what a side cannot run stands in place of the first."""
  shown = dict(row, peak=row["peak_bytes"] and row["peak_bytes"] / 2**30)
  for figure in FIGURES:
    if row[figure] is not None:
      shown[figure] = f"{1e3 * row[figure]:.4g} ± {1e3 * row[f'{figure}_spread']:.2g}"
  return shown | {FIGURES[0]: row["cannot"]} if row["cannot"] else shown
