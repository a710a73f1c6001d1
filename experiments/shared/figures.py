"""Draws lines with intervals, finishes axes and saves figures as PNG."""

import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image


def line_with_interval(
  axes: Axes, rows: Sequence[Mapping[str, Any]], x: str, names: Sequence[str], *style: str, **options: Any
) -> None:
  """Draws a line through table rows and shades its interval; `names` are its value and the ends of the interval."""
  places, values, *bounds = ([row[name] for row in rows] for name in (x, *names))
  (line,) = axes.plot(places, values, *style, **options)
  axes.fill_between(places, *bounds, color=line.get_color(), alpha=0.12)


def finish(axes: Axes, *, legend: int | None = None, **settings: Any) -> None:
  """Adds a grid, the settings of `Axes.set` and, if `legend` gives a font size, a legend."""
  axes.set(**settings)
  axes.grid(alpha=0.3)
  if legend is not None:
    axes.legend(fontsize=legend)


def save(path: pathlib.Path, figure: Figure, **options: Any) -> None:
  """Writes a PNG of 256 colours without opening a window, with options of `Figure.savefig`."""
  FigureCanvasAgg(figure)
  drawn = io.BytesIO()
  figure.savefig(drawn, **{"format": "png", "dpi": 150, "bbox_inches": "tight"} | options)
  Image.open(drawn).convert("RGB").quantize(256).save(path, optimize=True)  # a third of the size in full colour
