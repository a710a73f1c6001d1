"""Accuracy and agreement against FLOPs, fixed and adaptive."""

import itertools
import pathlib
from collections.abc import Sequence

from matplotlib.figure import Figure

from experiments import figures
from experiments.adaptive.tables import MEASURES, Row

STYLES = {"fixed": ("#555555", "o--"), "adaptive": ("#d1221b", "s-")}


def plot(path: pathlib.Path, fixed: Sequence[Row], adapted: Sequence[Row]) -> None:
  """Draws a panel for each measure.

  Args:
    path: of the picture.
    fixed: rows of the schedules by their FLOPs, the last without pruning.
    adapted: rows of the thresholds, ascending; of those with the same FLOPs only the first is named.
  """
  figure = Figure(figsize=(11, 4.2), layout="constrained")
  for axes, measure in zip(figure.subplots(1, len(MEASURES)), MEASURES.values(), strict=True):
    for (name, (colour, line)), rows in zip(STYLES.items(), (fixed, adapted), strict=True):
      flops = [row["flops"] for row in rows]
      axes.plot(flops, [row[measure] for row in rows], line, color=colour, label=name, markersize=4)
      bounds = ([row[f"{measure}_{end}"] for row in rows] for end in ("low", "high"))
      axes.fill_between(flops, *bounds, color=colour, alpha=0.12)
    axes.axhline(fixed[-1][measure], color=STYLES["fixed"][0], linestyle=":", label="no pruning")
    for flops, rows in itertools.groupby(adapted, key=lambda row: row["flops"]):
      first = next(rows)
      axes.annotate(f"{first['threshold']:g}", (flops, first[measure]), (3, -9), textcoords="offset points", fontsize=7)
    axes.set_xlim(0.9 * fixed[0]["flops"], 1.1 * max(row["flops"] for row in adapted))
    axes.set_xlabel("FLOPs of the decoder's prefill, all tokens and scoring, relative to no pruning")
    axes.set_ylabel(measure)
    axes.grid(alpha=0.3)
    axes.legend()
  figures.save(path, figure)
