"""From what was measured to tables: medians with their spread, and the ratios that matter."""

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from experiments import geometries, tabular
from experiments.benchmark.scenarios import Scenario
from experiments.benchmark.side import FIGURES
from experiments.benchmark.study import result_path
from himap_jax import flops
from himap_jax.schedule import Schedule

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
  num_image_tokens, schedule = geometries.num_image_tokens(config), geometries.schedule_of(config, method)
  pruned, plain = (flops.costs(config, s, num_image_tokens, scenario.num_text_tokens) for s in (schedule, Schedule()))
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


def write(output: pathlib.Path, all_results: Results, heading: str) -> None:
  """Writes `figures.csv`, `targets.csv` and both as Markdown in `benchmark.md`."""
  rows, held = list(figures(all_results)), list(targets(all_results))
  for name, table in (("figures", rows), ("targets", held)):
    tabular.write_csv(output / f"{name}.csv", table)
  devices = {result["device"] for results in all_results.values() for result in results.values() if "device" in result}
  text = [
    f"{heading} Devices: {', '.join(sorted(devices))}.",
    "",
    "## Targets",
    "",
    *_targets_markdown(held),
    "",
    "## Figures",
    "",
    *_figures_markdown(rows),
  ]
  (output / "benchmark.md").write_text("\n".join(text) + "\n", encoding="utf-8")


SCENARIO_COLUMNS = ("geometry", "instruction", "batch", "new tokens")


def _scenario(row: dict[str, Any]) -> list[str]:
  return [str(row[field.name]) for field in dataclasses.fields(Scenario)]


def _yes(met: bool) -> str:
  return "yes" if met else "no"


def _targets_markdown(rows: Sequence[dict[str, Any]]) -> list[str]:
  rows = sorted(rows, key=lambda row: row["ratio"])
  cells = [
    [
      row["ratio"],
      *_scenario(row),
      f"{row['measured']:.3f}",
      *(("–", "–") if row["target"] is None else (f"{row['target']:.3f}", _yes(row["measured"] <= row["target"]))),
    ]
    for row in rows
  ]
  return tabular.markdown(("ratio", *SCENARIO_COLUMNS, "measured", "at most", "met"), cells)


def _figures_markdown(rows: Sequence[dict[str, Any]]) -> list[str]:
  def cell(row: dict[str, Any], figure: str) -> str:
    if row[figure] is None:
      return "–"
    return f"{1e3 * row[figure]:.4g} ± {1e3 * row[f'{figure}_spread']:.2g}"

  cells = []
  for row in rows:
    if row["cannot"]:
      cells.append([*_scenario(row), row["side"], row["cannot"], *["–"] * (len(FIGURES) + 1)])
    else:
      others = [f"{row['prepare']:.1f}", f"{row['peak_bytes'] / 2**30:.1f}"]
      cells.append([*_scenario(row), row["side"], *(cell(row, figure) for figure in FIGURES), *others])
  header = (*SCENARIO_COLUMNS, "side", *(f"{figure}, ms" for figure in FIGURES), "compile and warm up, s", "peak, GiB")
  return tabular.markdown(header, cells)
