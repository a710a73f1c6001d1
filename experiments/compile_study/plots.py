"""Plots of the study."""

from collections.abc import Sequence

import matplotlib.ticker
from matplotlib.figure import Figure

from experiments.shared.tabular import Row

PARTS = {
  "running": ("mix_seconds", "#2f8fe0"),
  "reading the cache": ("compile_cached", "#e0b000"),
  "compiling": ("compile_cold", "#d1221b"),
}


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
  axes.set_xlabel("workloads run after one another, from an empty compilation cache")
  axes.set_ylabel("workloads per second, compilation included")
  axes.grid(alpha=0.3)
  axes.legend(fontsize=8)
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
