"""Plots of saliency: by block, by kind of token, and on pictures.

Axes: L layers, Q questions, N image tokens.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from PIL import Image

from experiments.flow import tokens
from experiments.shared import figures, statistics

COLOURS = dict(zip(tokens.BLOCKS, ("#d1221b", "#2f8fe0", "#e0b000", "#2e8b3d", "#5b4fc9", "#999999"), strict=True))
KIND_COLOURS = ("#2e8b3d", "#2f8fe0", "#d1221b")


def plot_blocks(result: dict[str, np.ndarray]) -> Figure:
  """Plots block saliency by layer, in both normalisations: S_vt and S_vv with intervals, and all blocks."""
  figure = Figure(figsize=(11, 7), layout="constrained")
  panels = figure.subplots(2, 2, sharex=True)
  for (main, every), values, label in zip(panels, result.values(), ("mean over pairs", "sum over pairs"), strict=True):
    for number, (name, colour) in enumerate(COLOURS.items()):
      rows = [{"layer": layer} | row for layer, row in enumerate(statistics.mean_rows({"mean": values[..., number]}))]
      present = [row for row in rows if not np.isnan(row["mean"])]
      if not present:
        continue
      style = {"color": colour, "label": name, "marker": "." if len(present) < len(rows) else ""}
      for row in present:
        row["mean"] = row["mean"] or np.nan  # S_vv of the last layer is 0 and has no logarithm
      every.plot(*([row[key] for row in present] for key in ("layer", "mean")), linewidth=1.4, **style)
      if number < 2:  # S_vt and S_vv
        figures.line_with_interval(main, present, "layer", statistics.names("mean"), **style)
    for axes in (main, every):
      figures.finish(axes, legend=8, yscale="log", ylabel=f"saliency, {label}")
  for axes in panels[1]:
    axes.set_xlabel("layer")
  return figure


def plot_contributions(result: dict[str, np.ndarray], *, of_all_layers: bool = False) -> Figure:
  """Plots contributions to the last token by layer: of all tokens of a kind, and of its average token."""
  figure = Figure(figsize=(11, 3.6), layout="constrained")
  titles = ("share of all saliency into the last token", "share of the kinds' mean a token")
  for axes, values, title in zip(figure.subplots(1, 2), result.values(), titles, strict=True):
    means = values.mean(axis=1).T
    layers = np.arange(means.shape[1])
    if of_all_layers:
      for mean, bottom, kind, colour in zip(
        means, np.cumsum(means, axis=0) - means, tokens.KINDS, KIND_COLOURS, strict=True
      ):
        axes.bar(layers, mean, bottom=bottom, label=kind, color=colour, alpha=0.8)
    else:
      axes.stackplot(layers, means, labels=tokens.KINDS, colors=KIND_COLOURS, alpha=0.8)
      axes.set(xmargin=0, ylim=(0, 1))
    axes.set_title(title + ", of all layers" * of_all_layers, fontsize=10)
    axes.set(xlabel="layer")
  axes.legend(fontsize=8, loc="upper left" if of_all_layers else "lower right")
  return figure


def plot_maps(
  pictures: Sequence[tuple[str, Image.Image]],
  maps: Float[np.ndarray, "L Q N"],
  grid: tuple[int, int],
  layers: Sequence[int],
) -> Figure:
  """Plots the saliency of image tokens in some layers as heat maps on titled pictures, one per question."""
  figure = Figure(figsize=(1.7 * (len(layers) + 1), 2.0 * len(pictures)), layout="constrained")
  panels = figure.subplots(len(pictures), len(layers) + 1, squeeze=False)
  for number, (row, (title, picture)) in enumerate(zip(panels, pictures, strict=True)):
    row[0].imshow(picture)
    row[0].set_title(title, fontsize=8)
    for axes, layer in zip(row[1:], layers, strict=True):
      heat, extent = maps[layer, number].reshape(grid), (0, picture.width, picture.height, 0)
      axes.imshow(picture.convert("L"), cmap="gray", alpha=0.6)
      axes.imshow(heat, cmap="inferno", alpha=0.65, extent=extent, vmax=np.quantile(heat, 0.99))
      axes.set_title(f"layer {layer}", fontsize=8)
  for axes in panels.ravel():
    axes.set_axis_off()
  return figure
