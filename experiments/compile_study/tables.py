"""From measurements to a row for every variant."""

import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from experiments import tabular
from experiments.compile_study.measure import Measurement
from experiments.compile_study.study import Results
from experiments.compile_study.variants import VARIANTS

Row = dict[str, Any]
MIB = 1 << 20

# Label in Markdown, format.
CPU_COLUMNS = {
  "variant": ("variant", "{}"),
  "programs": ("programs", "{}"),
  "compile_cold": ("compiling, s", "{:.1f}"),
  "compile_cached": ("from the cache, s", "{:.1f}"),
  "step": ("step ÷ best", "{:.2f}"),
  "instructions": ("HLO instructions", "{:,}"),
  "temporaries": ("temporaries, MiB", "{:.0f}"),
  "padding": ("padding", "{:.1%}"),
  "tokens_per_second": ("tokens/s", "{:.0f}"),
  "tokens_per_second_cached": ("with reading the cache", "{:.0f}"),
  "tokens_per_second_cold": ("with compiling", "{:.0f}"),
}
TPU_COLUMNS = {
  "variant": ("variant", "{}"),
  "tpu_programs": ("programs", "{}"),
  "tpu_compile": ("compiling, s", "{:.1f}"),
  "tpu_instructions": ("HLO instructions", "{:,}"),
  "tpu_temporaries": ("temporaries, MiB a device", "{:.0f}"),
  "tpu_collectives": ("collectives", "{}"),
  "tpu_selecting": ("of these for selecting", "{}"),
}


def make_rows(results: Results) -> list[Row]:
  """A row a variant: medians over turns; steps and rates are compared within each turn."""
  turns = list(zip(*results.turns.values(), strict=True))
  best = [min(measurement.step_seconds for measurement in turn) for turn in turns]
  rows = []
  for name, measured in results.turns.items():
    cold = results.cold[name]

    def median(value: Callable[[Measurement], float], measured: Sequence[Measurement] = measured) -> float:
      return statistics.median(map(value, measured))

    steps = [m.step_seconds / shortest for m, shortest in zip(measured, best, strict=True)]
    mix, cached = median(lambda m: m.mix_seconds), median(lambda m: m.compile_seconds)
    row: Row = {
      "variant": name,
      "programs": cold.num_programs,
      "compile_cold": cold.compile_seconds,
      "compile_cached": cached,
      "step_seconds": median(lambda m: m.step_seconds),
      "step": statistics.median(steps),
      "step_spread": (max(steps) - min(steps)) / 2,
      "instructions": cold.num_instructions,
      "temporaries": cold.temporaries / MIB,
      "padding": 1 - cold.num_tokens / cold.num_slots,
      "mix_seconds": mix,
      "tokens_per_second": cold.num_tokens / mix,
      "tokens_per_second_cached": cold.num_tokens / (mix + cached),
      "tokens_per_second_cold": cold.num_tokens / (mix + cold.compile_seconds),
    }
    if report := results.reports.get(name):
      row |= {
        "tpu_programs": report.num_programs,
        "tpu_compile": report.compile_seconds,
        "tpu_instructions": report.num_instructions,
        "tpu_temporaries": report.temporaries / MIB,
        "tpu_collectives": report.collectives,
        "tpu_selecting": report.selecting_collectives,
      }
    rows.append(row)
  return rows


def write(output: pathlib.Path, rows: Sequence[Row], heading: str, tpu_heading: str | None) -> None:
  """Writes `compile_study.csv` and `compile_study.md`."""
  tabular.write_csv(output / "compile_study.csv", rows)
  lines = [heading, "", *_markdown(CPU_COLUMNS, rows), ""]
  if tpu_heading is not None:
    lines += [tpu_heading, "", *_markdown(TPU_COLUMNS, [row for row in rows if "tpu_programs" in row]), ""]
  lines += [f"- `{row['variant']}`: {VARIANTS[row['variant']].shows}." for row in rows]
  (output / "compile_study.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _markdown(columns: dict[str, tuple[str, str]], rows: Sequence[Row]) -> list[str]:
  return tabular.markdown(
    [label for label, _ in columns.values()],
    ([form.format(row[name]) for name, (_, form) in columns.items()] for row in rows),
  )
