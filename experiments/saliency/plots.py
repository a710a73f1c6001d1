"""The paper's pictures of saliency.

Axes: L layers, Q questions, N image tokens, P blocks.
"""

import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from PIL import Image

from experiments import figures, statistics
from experiments.flow import tokens
from experiments.saliency.tables import INTRA_VISUAL, VISUAL_TEXTUAL, Blocks, Contributions

COLOURS = {
  "image→instruction": "#d1221b",
  "image→image": "#2f8fe0",
  "instruction→instruction": "#e0b000",
  "system→instruction": "#2e8b3d",
  "system→image": "#5b4fc9",
  "system→system": "#999999",
}
KIND_COLOURS = ("#2e8b3d", "#2f8fe0", "#d1221b")


def plot_blocks(path: pathlib.Path, result: Blocks) -> None:
  """Draws the saliency of blocks over layers: S_vt and S_vv with intervals, and all blocks, under both normalisations."""
  figure = Figure(figsize=(11, 7), layout="constrained")
  panels = figure.subplots(2, 2, sharex=True)
  layers = np.arange(result.by_pair.shape[0])
  for row, (values, label) in enumerate(((result.by_pair, "mean over pairs"), (result.summed, "sum over pairs"))):
    for number, name in enumerate(tokens.BLOCKS):
      mean = values[..., number].mean(axis=1)
      mean[mean == 0] = np.nan  # nothing flows within the image in the last layer, and there is no logarithm of it
      panels[row, 1].plot(layers, mean, color=COLOURS[name], label=name, linewidth=1.4)
      if name in (VISUAL_TEXTUAL, INTRA_VISUAL):
        panels[row, 0].plot(layers, mean, color=COLOURS[name], label=name)
        panels[row, 0].fill_between(
          layers, *statistics.interval(statistics.resample(values[..., number])), color=COLOURS[name], alpha=0.2
        )
    for axes in panels[row]:
      axes.set_yscale("log")
      axes.set_ylabel(f"saliency, {label}")
      axes.grid(alpha=0.3)
      axes.legend(fontsize=8)
  for axes in panels[1]:
    axes.set_xlabel("layer")
  figures.save(path, figure)


def plot_contributions(path: pathlib.Path, result: Contributions) -> None:
  """Draws what the last token receives from each kind of token: in all, and a token of the kind on average."""
  figure = Figure(figsize=(11, 3.6), layout="constrained")
  titles = ("share of all saliency into the last token", "share of the kinds' mean a token")
  for axes, values, title in zip(figure.subplots(1, 2), result, titles, strict=True):
    means = values.mean(axis=1).T
    axes.stackplot(np.arange(means.shape[1]), means, labels=tokens.KINDS, colors=KIND_COLOURS, alpha=0.8)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("layer")
    axes.set_ylim(0, 1)
    axes.margins(x=0)
  axes.legend(fontsize=8, loc="lower right")
  figures.save(path, figure)


def plot_maps(
  path: pathlib.Path,
  pictures: Sequence[tuple[str, Image.Image]],
  maps: Float[np.ndarray, "L Q N"],
  grid: tuple[int, int],
  layers: Sequence[int],
) -> None:
  """Draws where in each picture the saliency of some layers lies.

  Args:
    path: the file.
    pictures: title and picture of each question.
    maps: of these questions.
    grid: (rows, columns) of image tokens.
    layers: to show.
  """
  figure = Figure(figsize=(1.7 * (len(layers) + 1), 2.0 * len(pictures)), layout="constrained")
  panels = figure.subplots(len(pictures), len(layers) + 1, squeeze=False)
  for row, (title, picture) in enumerate(pictures):
    panels[row, 0].imshow(picture)
    panels[row, 0].set_title(title, fontsize=8)
    for axes, layer in zip(panels[row, 1:], layers, strict=True):
      heat = maps[layer, row].reshape(grid)
      axes.imshow(picture.convert("L"), cmap="gray", alpha=0.6)
      axes.imshow(
        heat, cmap="inferno", alpha=0.65, extent=(0, picture.width, picture.height, 0), vmax=np.quantile(heat, 0.99)
      )
      axes.set_title(f"layer {layer}", fontsize=8)
  for axes in panels.ravel():
    axes.set_axis_off()
  figures.save(path, figure)
