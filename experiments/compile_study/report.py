"""Tables and plots of the study: a row for every variant."""

import statistics
from collections.abc import Sequence

import matplotlib.ticker
from matplotlib.figure import Figure

from experiments.compile_study.measure import Measurement
from experiments.compile_study.variants import VARIANTS
from experiments.shared import figures, tabular
from experiments.shared.study import Report
from experiments.shared.tabular import Row

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
FORM_COLUMNS = {
  "answers of mixed lengths": "{form}",
  "programs": "{programs}",
  "compiling, s": "{compile_cold:.1f}",
  "from the cache, s": "{compile_cached:.1f}",
  "memory beside the weights, MiB": "{memory:.0f}",
  "slots in use": "{in_use:.1%}",
  "new tokens/s": "{tokens_per_second:.1f}",
  "time ÷ static batches'": "{time:.2f}",
}
PARTS = {
  "running": ("mix_seconds", "#2f8fe0"),
  "reading the cache": ("compile_cached", "#e0b000"),
  "compiling": ("compile_cold", "#d1221b"),
}


def make_rows(processes: dict[str, list[Measurement]], tpu: dict[str, Measurement]) -> list[Row]:
  """One row per variant: medians over turns; steps are compared within each turn."""
  best = [
    min(measured["step_seconds"] for measured in turn)
    for turn in zip(*(turns for _, *turns in processes.values()), strict=True)
  ]
  rows = []
  for name, (cold, *turns) in processes.items():
    step, mix, cached = (
      statistics.median(turn[figure] for turn in turns) for figure in ("step_seconds", "mix_seconds", "compile")
    )
    steps = [turn["step_seconds"] / shortest for turn, shortest in zip(turns, best, strict=True)]
    row = {
      "variant": name,
      "programs": cold["programs"],
      "compile_cold": cold["compile"],
      "compile_cached": cached,
      "step_seconds": step,
      "step": statistics.median(steps),
      "step_spread": (max(steps) - min(steps)) / 2,
      "instructions": cold["instructions"],
      "temporaries": cold["temporaries"],
      "padding": 1 - cold["num_tokens"] / cold["num_slots"],
      "mix_seconds": mix,
      "tokens_per_second": cold["num_tokens"] / mix,
      "tokens_per_second_cached": cold["num_tokens"] / (mix + cached),
      "tokens_per_second_cold": cold["num_tokens"] / (mix + cold["compile"]),
    }
    rows.append(row | {f"tpu_{figure}": value for figure, value in tpu.get(name, {}).items()})
  return rows


def make_form_rows(forms: dict[str, list[Measurement]], num_slots: int) -> list[Row]:
  """One row per form of answering: medians over turns; times are compared within each turn."""
  (_, *static), rows = next(iter(forms.values())), []
  for form, (cold, *turns) in forms.items():
    times = [turn["seconds"] / other["seconds"] for turn, other in zip(turns, static, strict=True)]
    row = {
      "form": f"{form}, {num_slots} rows",
      "programs": cold["programs"],
      "compile_cold": cold["compile"],
      "compile_cached": statistics.median(turn["compile"] for turn in turns),
      "memory": cold["memory"] / 2**20,
      "in_use": cold["in_use"],
      "tokens_per_second": cold["num_tokens"] / statistics.median(turn["seconds"] for turn in turns),
      "time": statistics.median(times),
    }
    rows.append(row)
  return rows


def make(rows: Sequence[Row], form_rows: Sequence[Row], count: str, tpu_heading: str | None) -> Report:
  """The report of `rows`, one per variant, and `form_rows`, one per way of answering; `tpu_heading` None leaves TPUs out."""
  lines = [*tabular.formatted(rows, CPU_COLUMNS), ""]
  if tpu_heading is not None:
    lines += [tpu_heading, "", *tabular.formatted([row for row in rows if "tpu_programs" in row], TPU_COLUMNS), ""]
  lines += [f"- `{row['variant']}`: {VARIANTS[row['variant']].shows}." for row in rows]
  lines += ["", *tabular.formatted(form_rows, FORM_COLUMNS)]
  drawn = {"seconds": seconds(rows), "break_even": break_even(rows)}
  return Report(count, lines, {"compile_study": rows, "answering": form_rows}, drawn)


def break_even(rows: Sequence[Row]) -> Figure:
  """Plots workloads per second, compilation included, against the number of workloads run."""
  figure = Figure(figsize=(7, 4.5))
  axes = figure.add_subplot()
  passes = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
  for number, row in enumerate(rows):
    rates = [count / (row["compile_cold"] + count * row["mix_seconds"]) for count in passes]
    axes.plot(passes, rates, marker="osD^v<>Ph*"[number % 10], markersize=4, label=row["variant"])
  axes.set_xscale("log")
  axes.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
  xlabel = "workloads run after one another, from an empty compilation cache"
  figures.finish(axes, legend=8, xlabel=xlabel, ylabel="workloads per second, compilation included")
  return figure


def seconds(rows: Sequence[Row]) -> Figure:
  """Plots the seconds of one pass, added to those of compiling or reading its programs."""
  figure = Figure(figsize=(8, 0.45 * len(rows) + 1.2))
  axes = figure.add_subplot()
  for number, row in enumerate(reversed(rows)):
    left = 0.0
    for name, (column, colour) in PARTS.items():
      axes.barh(number, row[column], left=left, color=colour, label=name if number == 0 else None)
      left += row[column]
  axes.set_yticks(range(len(rows)), [row["variant"] for row in reversed(rows)])
  axes.set_xlabel("seconds for one pass over the workload: running, reading programs from the cache, compiling them")
  axes.legend(fontsize=8)
  return figure
