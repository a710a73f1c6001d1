"""From what was measured to tables: medians with their spread, and the ratios that matter."""

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Callable, Iterator, Sequence

from experiments.shared import geometries, tabular
from experiments.shared.study import Report
from experiments.shared.tabular import Row
from experiments.speed.side import FIGURES, Scenario
from experiments.speed.study import Result, result_path
from himap_jax.engine.accounting import model_sizes
from himap_jax.pruning import cost
from himap_jax.pruning.schedule import Schedule

Results = dict[Scenario, dict[str, Result]]
Target = Callable[[Scenario], float | None]


@dataclasses.dataclass(frozen=True)
class Ratio:
  """A figure of one side in units of another's, turn by turn.

  Attributes:
    name: what is compared.
    figure: which figure.
    side: whose, above the line.
    reference: whose, below it.
    target: the largest value that we hold to in a scenario, where there is one.
    unit: which figure is below the line, where it is another one.
    num_new_tokens: outputs it is meant for; any when None.
  """

  name: str
  figure: str
  side: str
  reference: str
  target: Target
  unit: str | None = None
  num_new_tokens: int | None = None


def flops_ratio(scenario: Scenario, method: str) -> float:
  """What a method should take: the decoder's prefill on all tokens in units of no pruning, the last token's logits included."""
  config = geometries.model_of(scenario.geometry)
  num_tokens = geometries.num_image_tokens(config), scenario.num_text_tokens
  schedules = geometries.schedule_of(config, method), Schedule()
  pruned, plain = (cost.costs(model_sizes(config), schedule, *num_tokens) for schedule in schedules)
  return (pruned.decoder + pruned.head) / (plain.decoder + plain.head)


def _at(target: float, *names: str) -> Target:
  """A target of some geometries."""
  return lambda scenario: target if scenario.geometry in names else None


AUTHORS = "our HiMAP example ÷ the authors' algorithm"
INT8_DECODE = "our decode per token with int8 weights ÷ transformers'"
RATIOS = (
  Ratio("HiMAP prefill ÷ our vanilla prefill", "prefill", "himap", "none", lambda at: 1.1 * flops_ratio(at, "himap")),
  Ratio("scoring's share of a pruned prefill", "scoring", "himap", "himap", lambda _: 0.01, unit="prefill"),
  Ratio("our vanilla prefill ÷ transformers'", "prefill", "none", "transformers", _at(1.0, "demo", "7b")),
  Ratio("our decode per token ÷ transformers'", "decode", "none", "transformers", _at(0.85, "7b")),
  Ratio(INT8_DECODE, "decode", "none/int8", "transformers", _at(0.5, "7b")),
  Ratio(AUTHORS, "example", "himap", "authors", _at(0.5, "7b"), num_new_tokens=1),
  Ratio(AUTHORS, "example", "himap", "authors", _at(0.1, "7b"), num_new_tokens=32),
  Ratio(f"{AUTHORS} with a cache", "example", "himap", "authors_cache", _at(0.9, "7b")),
)


def read(workdir: pathlib.Path, scenarios: Sequence[Scenario]) -> Results:
  """What has been measured of the scenarios."""
  paths = {scenario: result_path(workdir, scenario) for scenario in scenarios}
  return {scenario: json.loads(path.read_text()) for scenario, path in paths.items() if path.exists()}


def seconds(result: Result, figure: str) -> list[float]:
  """A figure, turn by turn; empty where it was not measured."""
  return [turn[figure] for turn in result.get("turns", ()) if figure in turn]


def measured(ratio: Ratio, results: dict[str, Result]) -> float | None:
  """The median of a ratio over turns; None where one of its figures was not measured."""
  above = seconds(results.get(ratio.side, {}), ratio.figure)
  below = seconds(results.get(ratio.reference, {}), ratio.unit or ratio.figure)
  pairs = list(zip(above, below, strict=False))
  return statistics.median(a / b for a, b in pairs) if pairs else None


def targets(all_results: Results) -> Iterator[Row]:
  """Every ratio that we hold to a target, scenario by scenario."""
  for scenario, results in all_results.items():
    where = dataclasses.asdict(scenario)
    for ratio in RATIOS:
      value = measured(ratio, results)
      if value is not None and ratio.num_new_tokens in (None, scenario.num_new_tokens):
        yield {"ratio": ratio.name, **where, "measured": value, "target": ratio.target(scenario)}
    for name in ("none", "himap"):
      result = results.get(name, {})
      if "decode_bytes" in result:
        value = result["decode_bytes"] / result["decode_bytes_needed"]
        label = f"bytes of a decoded token ÷ weights and cache ({name})"
        yield {"ratio": label, **where, "measured": value, "target": 1.15}


def figures(all_results: Results) -> Iterator[Row]:
  """One row a scenario and side: medians, and half the distance between the extremes as the spread."""
  for scenario, results in all_results.items():
    for name, result in results.items():
      row = {**dataclasses.asdict(scenario), "side": name, "turns": len(result.get("turns", ()))}
      for figure in FIGURES:
        values = seconds(result, figure)
        row[figure] = statistics.median(values) if values else None
        row[f"{figure}_spread"] = (max(values) - min(values)) / 2 if values else None
      yield row | {key: result.get(key) for key in ("prepare", "peak_bytes", "cannot")}


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
TARGET_COLUMNS = {"ratio": "{ratio}", **SCENARIO_COLUMNS}
TARGET_COLUMNS |= {"measured": "{measured:.3f}", "at most": "{target:.3f}", "met": "{met}"}
FIGURE_COLUMNS = {**SCENARIO_COLUMNS, "side": "{side}", **{f"{figure}, ms": f"{{{figure}}}" for figure in FIGURES}}
FIGURE_COLUMNS |= {"compile and warm up, s": "{prepare:.1f}", "peak, GiB": "{peak:.1f}"}


def _held(row: Row) -> Row:
  """A target, with whether it is met."""
  target = row["target"]
  return {**row, "met": None if target is None else "yes" if row["measured"] <= target else "no"}


def _milliseconds(row: Row) -> Row:
  """Figures in milliseconds with their spread; what a side cannot run stands in place of the first."""
  shown = dict(row, peak=row["peak_bytes"] and row["peak_bytes"] / 2**30)
  for figure in FIGURES:
    if row[figure] is not None:
      shown[figure] = f"{1e3 * row[figure]:.4g} ± {1e3 * row[f'{figure}_spread']:.2g}"
  return shown | {FIGURES[0]: row["cannot"]} if row["cannot"] else shown
