"""From measurements to a row for every variant."""

import statistics
from collections.abc import Callable, Sequence

from experiments.compile_study import plots
from experiments.compile_study.measure import Measurement
from experiments.compile_study.study import Results
from experiments.compile_study.variants import VARIANTS
from experiments.shared import tabular
from experiments.shared.study import Report
from experiments.shared.tabular import Row

MIB = 1 << 20

CPU_COLUMNS = {
  "variant": "{variant}",
  "programs": "{programs}",
  "compiling, s": "{compile_cold:.1f}",
  "from the cache, s": "{compile_cached:.1f}",
  "step ÷ best": "{step:.2f}",
  "HLO instructions": "{instructions:,}",
  "temporaries, MiB": "{temporaries:.0f}",
  "padding": "{padding:.1%}",
  "tokens/s": "{tokens_per_second:.0f}",
  "with reading the cache": "{tokens_per_second_cached:.0f}",
  "with compiling": "{tokens_per_second_cold:.0f}",
}
TPU_COLUMNS = {
  "variant": "{variant}",
  "programs": "{tpu_programs}",
  "compiling, s": "{tpu_compile:.1f}",
  "HLO instructions": "{tpu_instructions:,}",
  "temporaries, MiB a device": "{tpu_temporaries:.0f}",
  "collectives": "{tpu_collectives}",
  "of these for selecting": "{tpu_selecting}",
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
    row = {
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


def report(rows: Sequence[Row], count: str, tpu_heading: str | None) -> Report:
  """`compile_study.csv`, `compile_study.md` and both plots; `tpu_heading` stands above what the TPU's compiler says."""
  lines = [*tabular.formatted(rows, CPU_COLUMNS), ""]
  if tpu_heading is not None:
    lines += [tpu_heading, "", *tabular.formatted([row for row in rows if "tpu_programs" in row], TPU_COLUMNS), ""]
  lines += [f"- `{row['variant']}`: {VARIANTS[row['variant']].shows}." for row in rows]
  drawn = {"seconds": plots.seconds(rows), "break_even": plots.break_even(rows)}
  return Report(count, lines, {"compile_study": rows}, drawn)
