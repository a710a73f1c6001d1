"""Plots of accuracy against costs, over all questions and by type, and of the patches that cells keep."""

import collections
import pathlib
import textwrap
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.compare.comparison import BY_SIZE, BY_TYPE, QUESTION_ONLY, Row
from experiments.compare.comparison import CONTROLS as RANDOM
from experiments.compare.grid import REFERENCE, method_names
from experiments.compare.report import Example
from experiments.compare.tables import groups_of
from experiments.question_sets import is_right
from experiments.shared import figures
from experiments.shared.statistics import pareto_front
from himap_jax.pruning.methods import METHODS
from himap_jax.run.drawing import fade

BEFORE, INSIDE, BOTH, CONTROL = "before the decoder", "inside the decoder", "before + inside", "controls"
PLACES = {"before": BEFORE, "inside": INSIDE, "anywhere": CONTROL}
PALETTES = {
  BEFORE: "#0b4f9e #2f8fe0 #12b5cb #0a7d6f #5b4fc9 #8fb8f0 #3b2a7a #6ec1c8 #7a86d9 #00384d".split(),
  INSIDE: "#d1221b #f08a24 #a8324e #e0b000 #8a4b1f #f2739b #5c0f0f #ff6f3c #7a6a00 #c04fa8".split(),
  BOTH: "#2e8b3d #8fbc3f #145225".split(),
  CONTROL: "#555555 #a0a0a0 #000000".split(),
}
MARKERS = {BEFORE: "sD^v<>342|", INSIDE: "ohp*8HP", BOTH: "dX", CONTROL: "x+1"}
NO_PRUNING = {"color": "#000000", "linestyle": (0, (6, 4)), "linewidth": 0.8}
BASELINE = {"color": "#888888", "linestyle": ":", "linewidth": 0.8}
FRONT = {"color": "#222222", "alpha": 0.35, "linewidth": 2}
COLUMNS = 9  # of the strips
PANELS_ACROSS = 5
NAMED_LINES = 5  # methods that a panel names
RIGHT, WRONG = "#1a7f37", "#c1121f"
BOX = {"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": "none", "alpha": 0.75}


class Style(NamedTuple):
  """How a method is drawn."""

  place: str
  colour: str
  marker: str

  def look(self, *, filled: bool) -> dict[str, Any]:
    is_line = self.marker in "x+1234|"
    edge = {"markeredgecolor": self.colour, "markeredgewidth": 1.8 if is_line else 1.4}
    if filled and not is_line:
      edge = {"markeredgecolor": "white", "markeredgewidth": 0.5}
    face, size = self.colour if filled else "white", 8 if self.marker == "*" else 6.5
    return {"marker": self.marker, "color": self.colour, "markersize": size, "markerfacecolor": face, **edge}


def styles_of(rows: Sequence[Row]) -> dict[str, Style]:
  """A style for every method, grouped by where it acts; with layers of its own it counts as another method."""
  styles, used = {}, collections.Counter()
  for method in dict.fromkeys(row["method"] for row in _pruned(rows)):
    names = method_names(method)
    place = BOTH if len(names) > 1 else PLACES[METHODS[names[0]].acts]
    colours, markers = PALETTES[place], MARKERS[place]
    turn, index = divmod(used[place], len(colours))  # other markers in every turn
    styles[method] = Style(place, colours[index], markers[(index + turn) % len(markers)])
    used[place] += 1
  return styles


def _pruned(rows: Sequence[Row]) -> list[Row]:
  return [row for row in rows if row.get("accuracy") is not None and row["method"] not in (REFERENCE, QUESTION_ONLY)]


class Cost(NamedTuple):
  """A cost that accuracy is drawn against: its column, what it is, and the ticks of its logarithmic axis."""

  column: str
  label: str
  ticks: Sequence[float]


FLOPS = Cost("all_token_flops", "FLOPs of the decoder's prefill, all tokens and scoring", (0.1, 0.2, 0.3, 0.5, 1.0))
TIME = Cost("prefill_time", "time of the prefill with the tower, median of turns", (0.3, 0.5, 0.7, 1.0))


def plot_costs(path: pathlib.Path, rows: Sequence[Row], cost: Cost) -> None:
  """Plots accuracy against a cost relative to no pruning, one panel per method, the most accurate first.

  Every panel has no pruning, the method's control, and the Pareto front of all methods; a method's points on it are named.
  """
  none, styles, run = rows[0], styles_of(rows), [row for row in _pruned(rows) if row.get(cost.column) is not None]
  methods = collections.defaultdict(list)
  for row in sorted(run, key=lambda row: row[cost.column]):
    methods[row["method"]].append(row)
  method_of = {row["label"]: row["method"] for row in run}
  front = [run[i] for i in pareto_front([row[cost.column] for row in run], [row["accuracy"] for row in run])]
  accuracy = {name: np.mean([row["accuracy"] for row in own]) for name, own in methods.items()}
  panels_of = sorted((name for name in methods if name not in RANDOM), key=lambda name: -accuracy[name])
  num_columns = min(PANELS_ACROSS, max(1, len(panels_of)))
  num_rows = max(1, -(-len(panels_of) // num_columns))
  figure = Figure(figsize=(2.7 * num_columns, 2.3 * num_rows + 0.6), layout="constrained")
  panels = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False).ravel()
  for axes, method in zip(panels, panels_of, strict=False):
    axes.axhline(none["accuracy"], zorder=0, **NO_PRUNING)
    axes.step(*_points(front, cost), where="post", zorder=1, **FRONT)
    own, colour = methods[method], styles[method].colour
    control = methods.get(next((method_of.get(row["control"]) for row in own if row.get("control")), None), [])
    axes.plot(*_points(control, cost), color="#777777", linewidth=1.2, marker="x", markersize=4, zorder=2)
    for row in own:
      ends = [row["accuracy_low"], row["accuracy_high"]]
      axes.plot([row[cost.column]] * 2, ends, color=colour, linewidth=1.2, alpha=0.5, zorder=3)
    axes.plot(*_points(own, cost), color=colour, linewidth=1.4, marker="o", markersize=4.5, zorder=4)
    for row in own:
      if row in front:
        name = f"{row['budget']:g}" if row["budget"] else "as set"
        at = {"textcoords": "offset points", "fontsize": 7.5, "fontweight": "bold", "zorder": 5, "bbox": BOX}
        axes.annotate(name, (row[cost.column], row["accuracy"]), (-3, 7), **at)
    axes.set_title(method, loc="left", fontsize=9.5, fontweight="bold", color=colour)
    _logarithmic(axes, cost.ticks, ticker.PercentFormatter(1.0, decimals=0))
  for axes in panels[len(panels_of) :]:
    axes.set_axis_off()
  figure.supxlabel(f"{cost.label}, relative to no pruning", fontsize=10)
  figure.supylabel("accuracy, with 95% intervals", fontsize=10)
  control_look = {"color": "#777777", "linewidth": 1.2, "marker": "x", "markersize": 4}
  looks = {"no pruning": NO_PRUNING, "random tokens": control_look, "Pareto front of all, its points named": FRONT}
  handles = [Line2D([], [], **look) for look in looks.values()]
  figure.legend(handles, list(looks), loc="outside upper center", ncols=len(looks), frameon=False, fontsize=9)
  figures.save(path, figure)


def plot_sizes(path: pathlib.Path, rows: Sequence[Row]) -> None:
  """Plots accuracy against the size of what is asked for, one panel per budget; the best methods are named."""
  sizes, styles = groups_of(rows, BY_SIZE), styles_of(rows)
  budgets = sorted({row["budget"] for row in _pruned(rows) if row["budget"]}, reverse=True)
  figure = Figure(figsize=(4.2 * max(1, len(budgets)), 4.0), layout="constrained")
  panels = figure.subplots(1, max(1, len(budgets)), sharey=True, squeeze=False).ravel()

  def values(row: Row) -> list[float]:
    return [row[f"{BY_SIZE}{size}"] for size in sizes]

  for axes, budget in zip(panels, budgets, strict=False):
    own = sorted((row for row in _pruned(rows) if row["budget"] == budget), key=lambda row: -row["accuracy"])
    named = [row["method"] for row in own if row["method"] not in RANDOM][:NAMED_LINES]
    axes.plot(sizes, values(rows[0]), marker="*", **{**NO_PRUNING, "label": "no pruning"})
    axes.plot(sizes, values(rows[1]), **{**BASELINE, "label": "question only"})
    for row in own:
      if row["method"] in RANDOM:
        axes.plot(sizes, values(row), color="#555555", linewidth=1.8, marker="x", zorder=4, label=row["method"])
      elif row["method"] in named:
        style = styles[row["method"]]
        axes.plot(sizes, values(row), linewidth=1.5, zorder=3, label=row["method"], **style.look(filled=True))
      else:
        axes.plot(sizes, values(row), color="#cccccc", linewidth=0.8, zorder=1)
    axes.set_title(f"{budget:g} tokens", loc="left", fontsize=11, fontweight="bold")
    axes.legend(frameon=False, fontsize=8)
    _accuracies(axes)
  figure.supxlabel("size of what is asked for, in image tokens along a side", fontsize=10)
  figure.supylabel("accuracy", fontsize=10)
  figures.save(path, figure)


def _points(rows: Sequence[Row], cost: Cost) -> tuple[list[float], list[float]]:
  return [row[cost.column] for row in rows], [row["accuracy"] for row in rows]


def plot_types(path: pathlib.Path, rows: Sequence[Row]) -> None:
  """Plots accuracy against image tokens per layer, one panel per question type."""
  types, styles = groups_of(rows, BY_TYPE), styles_of(rows)
  num_columns = min(3, len(types))
  num_rows = -(-len(types) // num_columns)
  figure = Figure(figsize=(4.2 * num_columns, 3.3 * num_rows), layout="constrained")
  panels = figure.subplots(num_rows, num_columns, sharex=True, squeeze=False).ravel()
  budgets = {row["budget"] for row in _pruned(rows) if row["budget"]}
  ticks = sorted(budgets or {row["tokens_updated"] for row in _pruned(rows)})
  for axes, type in zip(panels, types, strict=False):
    _draw(axes, rows, ("tokens_updated", f"{BY_TYPE}{type}"), styles, ticks, ticker.FormatStrFormatter("%g"))
    axes.set_title(type, loc="left", fontsize=11, fontweight="bold")
  for axes in panels[len(types) :]:
    axes.set_axis_off()
  figure.supxlabel("image tokens per layer, on average", fontsize=10)
  figure.supylabel("accuracy", fontsize=10)
  _legend(figure, rows, styles, {"no pruning": NO_PRUNING, "question only": BASELINE})
  figures.save(path, figure)


def draw_strips(path: pathlib.Path, examples: Sequence[Example], labels: Sequence[str]) -> None:
  """Draws a block for every example: the picture as each cell's last layers see it, with its answer below."""
  if not examples:
    return
  lines, columns = -(-len(labels) // COLUMNS), min(COLUMNS, len(labels))
  figure = Figure(figsize=(1.55 * columns, (1.95 * lines + 0.45) * len(examples)), layout="constrained")
  blocks = figure.subfigures(len(examples), 1, squeeze=False).ravel()
  for block, example in zip(blocks, examples, strict=True):
    block.suptitle(
      f"{example.question.question}  —  {example.question.answer}", x=0.005, ha="left", fontsize=11, fontweight="bold"
    )
    panels = block.subplots(lines, columns, squeeze=False).ravel()
    for axes in panels:
      axes.set_axis_off()
    for axes, label in zip(panels, labels, strict=False):
      _panel(axes, example, label)
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Glyph .* missing from font")  # other scripts are drawn as boxes
    figures.save(path, figure, dpi=110, bbox_inches=None)


def _panel(axes: Axes, example: Example, label: str) -> None:
  shown = example.cells.get(label)
  axes.set_title(label, fontsize=8.5, pad=3)
  if shown is None:
    return
  stages = sorted(shown.stages, key=lambda stage: stage[0])
  axes.imshow(fade(example.picture, example.kept_mask(stages[-1][1])) if stages else example.picture)
  mark, colour = ("✓", RIGHT) if is_right(shown.answer, example.question.answer) else ("✗", WRONG)
  text = f"{mark} {textwrap.shorten(shown.answer, 22, placeholder='…') or '(nothing)'}"
  axes.text(0.5, -0.04, text, transform=axes.transAxes, ha="center", va="top", fontsize=8.5, color=colour)


def _draw(
  axes: Axes, rows: Sequence[Row], names: tuple[str, str], styles: dict[str, Style], ticks: Sequence[float], form: Any
) -> None:
  """Draws all cells and both baselines; the first of `names` is the logarithmic axis, its ticks formatted by `form`."""
  x, y = names
  points = collections.defaultdict(list)
  for row in _pruned(rows):
    filled = row["budget"] is not None
    axes.plot(row[x], row[y], zorder=3, linestyle="none", **styles[row["method"]].look(filled=filled))
    if filled:
      points[row["method"]].append((row[x], row[y]))
  for method, own in points.items():
    line = {"linestyle": "--" if "@" in method else "-", "linewidth": 1.1, "alpha": 0.75, "zorder": 2}
    axes.plot(*zip(*sorted(own, key=lambda point: point[0]), strict=True), color=styles[method].colour, **line)
  axes.axhline(rows[0][y], zorder=0, **NO_PRUNING)
  axes.axhline(rows[1][y], zorder=0, **BASELINE)
  _logarithmic(axes, ticks, form)


def _accuracies(axes: Axes) -> None:
  """A vertical axis of accuracies."""
  axes.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, decimals=0))
  axes.spines[["top", "right"]].set_visible(False)
  axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
  axes.set_axisbelow(True)


def _logarithmic(axes: Axes, ticks: Sequence[float], form: Any) -> None:
  """A logarithmic axis of costs, a linear one of accuracies."""
  axes.set_xscale("log")
  axes.xaxis.set_major_locator(ticker.FixedLocator(ticks))
  low, high = axes.get_xlim()
  if sum(low <= tick <= high for tick in ticks) < 2:
    axes.set_xlim(min(low, ticks[0]), max(high, ticks[-1]))
  axes.xaxis.set_minor_locator(ticker.NullLocator())
  axes.xaxis.set_major_formatter(form)
  _accuracies(axes)


def _legend(figure: Figure, rows: Sequence[Row], styles: dict[str, Style], extra: dict[str, dict[str, Any]]) -> None:
  entries = [(Line2D([], [], **look), label) for label, look in extra.items()]
  methods = list(dict.fromkeys((row["method"], row["budget"] is not None) for row in _pruned(rows)))
  for place in PALETTES:
    own = [(method, filled) for method, filled in methods if styles[method].place == place]
    if own:
      entries.append((Line2D([], [], linestyle="none"), f"$\\bf{{{place.replace(' ', '~')}}}$"))
    for method, filled in own:
      line = ("--" if "@" in method else "-") if filled else "none"
      look = {"linestyle": line, **styles[method].look(filled=filled)}
      entries.append((Line2D([], [], **look), method if filled else f"{method}, as set"))
  look = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5), "frameon": False, "fontsize": 9, "handlelength": 2.6}
  figure.legend(*zip(*entries, strict=True), **look)
