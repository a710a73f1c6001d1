"""The study in two pictures."""

import pathlib
from collections.abc import Sequence

import matplotlib.ticker
from matplotlib.figure import Figure

from experiments import figures
from experiments.compile_study.tables import Row

COLOURS = {"running": "#2f8fe0", "reading the cache": "#e0b000", "compiling": "#d1221b"}


def plot_break_even(path: pathlib.Path, rows: Sequence[Row]) -> None:
  """Draws seconds against how often the workload is run, compilation included."""
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
  figures.save(path, figure)


def plot_seconds(path: pathlib.Path, rows: Sequence[Row]) -> None:
  """Draws what one pass over the workload takes, on top of what it takes to compile its programs or to read them."""
  figure = Figure(figsize=(8, 0.45 * len(rows) + 1.2))
  axes = figure.add_subplot()
  for number, row in enumerate(reversed(rows)):
    parts = (
      ("running", row["mix_seconds"]),
      ("reading the cache", row["compile_cached"]),
      ("compiling", row["compile_cold"]),
    )
    left = 0.0
    for name, seconds in parts:
      axes.barh(number, seconds, left=left, color=COLOURS[name], label=name if number == 0 else None)
      left += seconds
  axes.set_yticks(range(len(rows)), [row["variant"] for row in reversed(rows)])
  axes.set_xlabel("seconds for one pass over the workload: running, reading programs from the cache, compiling them")
  axes.legend(fontsize=8)
  figures.save(path, figure)
