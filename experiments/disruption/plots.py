"""Consistency and bias ratio over layers."""

import pathlib
from collections.abc import Sequence

from matplotlib.figure import Figure

from experiments import figures
from experiments.disruption.interventions import BLOCKS
from experiments.disruption.study import MODES
from experiments.disruption.tables import Row

COLOURS = {BLOCKS[0]: "#d1221b", BLOCKS[1]: "#2f8fe0"}
LINES = {"block": "-", "as many": "--", "as much": ":", "image→random": "-."}
MEASURES = {"is_same": "label consistency", "overlap": "score consistency", "divergence": "divergence, nats"}


def plot_consistency(path: pathlib.Path, rows: Sequence[Row]) -> None:
  """Draws every measure over layers: colour for the block, line for which pairs, a row of panels for each way and mode."""
  ways = list(dict.fromkeys(row["intervention"].rpartition(", ")[2] for row in rows))
  figure = Figure(figsize=(12, 3.1 * len(ways) * len(MODES)), layout="constrained")
  panels = figure.subplots(len(ways) * len(MODES), len(MEASURES), squeeze=False, sharex=True)
  for number, (how, mode) in enumerate((how, mode) for how in ways for mode in MODES):
    own = [row for row in rows if row["mode"] == mode and row["intervention"].endswith(f", {how}")]
    for axes, (measure, label) in zip(panels[number], MEASURES.items(), strict=True):
      for name in dict.fromkeys(row["intervention"] for row in own):
        series = [row for row in own if row["intervention"] == name]
        colour = COLOURS[next(block for block in BLOCKS if block in name)]
        line = next((style for start, style in LINES.items() if name.startswith(start)), "-")
        layers = [row["layer"] for row in series]
        pairs = name.rpartition(", ")[0]
        axes.plot(layers, [row[measure] for row in series], line, color=colour, label=pairs, marker=".", linewidth=1.3)
        bounds = ([row[f"{measure}_{end}"] for row in series] for end in ("low", "high"))
        axes.fill_between(layers, *bounds, color=colour, alpha=0.1)
      axes.set_ylabel(label)
      axes.set_title(f"{how}, {mode}", fontsize=9)
      axes.grid(alpha=0.3)
    panels[number, 0].legend(fontsize=7)
  for axes in panels[-1]:
    axes.set_xlabel("layer")
  figures.save(path, figure)


def plot_bias(path: pathlib.Path, rows: Sequence[Row]) -> None:
  """Draws the bias ratio over layers, a panel for each mode."""
  figure = Figure(figsize=(11, 3.8), layout="constrained")
  for axes, mode in zip(figure.subplots(1, len(MODES), sharey=True), MODES, strict=True):
    for chosen, how in dict.fromkeys((row["chosen"], row["how"]) for row in rows):
      series = [row for row in rows if (row["chosen"], row["how"], row["mode"]) == (chosen, how, mode)]
      layers = [row["layer"] for row in series]
      (line,) = axes.plot(layers, [row["bias"] for row in series], marker=".", label=f"{chosen}, {how}")
      bounds = ([row[end] for row in series] for end in ("low", "high"))
      axes.fill_between(layers, *bounds, color=line.get_color(), alpha=0.12)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_title(f"{mode}; above 0 image→image matters more", fontsize=9)
    axes.set_xlabel("layer")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
  figures.save(path, figure)
