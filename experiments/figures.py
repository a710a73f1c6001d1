"""Plots in files."""

import pathlib

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def save(path: pathlib.Path, figure: Figure) -> None:
  """Writes a figure; no window is ever opened."""
  FigureCanvasAgg(figure)
  figure.savefig(path, dpi=150, bbox_inches="tight")
