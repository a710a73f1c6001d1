"""Accuracy against costs, over all questions and by type."""

import collections
import dataclasses
import pathlib
from collections.abc import Sequence

import matplotlib.ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments import figures
from experiments.compare.grid import REFERENCE
from experiments.compare.tables import BY_TYPE, QUESTION_ONLY, Row, types_of
from experiments.statistics import pareto_front
from himap_jax.methods import METHODS, parse

BEFORE, INSIDE, BOTH, CONTROL = "before the decoder", "inside the decoder", "before + inside", "controls"
PALETTES = {
  BEFORE: ("#0b4f9e", "#2f8fe0", "#12b5cb", "#0a7d6f", "#5b4fc9", "#8fb8f0"),
  INSIDE: (
    "#d1221b",
    "#f08a24",
    "#a8324e",
    "#e0b000",
    "#8a4b1f",
    "#f2739b",
    "#5c0f0f",
    "#ff6f3c",
    "#7a6a00",
    "#c04fa8",
  ),
  BOTH: ("#2e8b3d", "#8fbc3f", "#145225"),
  CONTROL: ("#555555", "#a0a0a0", "#000000"),
}
MARKERS = {BEFORE: "sD^v<>", INSIDE: "ohp*8HP", BOTH: "dX", CONTROL: "x+1"}


@dataclasses.dataclass(frozen=True)
class Style:
  """How a method is drawn."""

  place: str
  colour: str
  marker: str


def place_of(family: str) -> str:
  """Where a method acts."""
  names = parse(family)
  if len(names) > 1:
    return BOTH
  acts = METHODS[names[0]].acts
  return {"anywhere": CONTROL, "before": BEFORE, "inside": INSIDE}[acts]


def styles_of(rows: Sequence[Row]) -> dict[str, Style]:
  """A style for every method among the rows, grouped by place; one with layers of its own is another method."""
  methods = dict.fromkeys(row["method"] for row in _pruned(rows))
  styles, used = {}, collections.Counter()
  for method in methods:
    place = place_of(method.partition("@")[0])
    number = used[place]
    used[place] += 1
    styles[method] = Style(place, *(wheel[number % len(wheel)] for wheel in (PALETTES[place], MARKERS[place])))
  return styles


def _pruned(rows: Sequence[Row]) -> list[Row]:
  return [row for row in rows if row.get("accuracy") is not None and row["method"] not in (REFERENCE, QUESTION_ONLY)]


def _row(rows: Sequence[Row], name: str) -> Row:
  return next(row for row in rows if row["method"] == name)


def plot_pareto(path: pathlib.Path, rows: Sequence[Row]) -> None:
  """Draws accuracy against the FLOPs on all tokens and of scoring, with the front of what nothing else beats."""
  figure = Figure(figsize=(12, 6.8))
  axes = figure.subplots()
  none, blind = _row(rows, REFERENCE), _row(rows, QUESTION_ONLY)
  styles = styles_of(rows)
  run = [none, *_pruned(rows)]
  front = [run[i] for i in pareto_front([r["all_token_flops"] for r in run], [r["accuracy"] for r in run])]
  axes.step(
    [row["all_token_flops"] for row in front], [row["accuracy"] for row in front],
    where="post", color="#222222", linewidth=2, alpha=0.35, zorder=1,
  )  # fmt: skip
  _draw(axes, rows, "all_token_flops", "accuracy", styles, bars=True)
  _point(axes, none, "all_token_flops", "accuracy", Style(CONTROL, "#000000", "*"), filled=True, bars=True)
  axes.axhline(none["accuracy"], color="#000000", linewidth=0.8, linestyle=(0, (6, 4)), zorder=0)
  axes.axhline(blind["accuracy"], color="#888888", linewidth=0.8, linestyle=":", zorder=0)
  axes.set_xscale("log")
  costs = [row["all_token_flops"] for row in run]
  axes.set_xlim(min(costs) / 1.12, max(costs) * 1.12)
  axes.xaxis.set_major_locator(matplotlib.ticker.FixedLocator([0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0]))
  axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
  _percent(axes.xaxis)
  _percent(axes.yaxis)
  axes.annotate("question only", (axes.get_xlim()[0], blind["accuracy"]), (3, 3), textcoords="offset points", color="#666666", fontsize=9)  # fmt: skip
  axes.set_xlabel("FLOPs of the decoder's prefill, all tokens and scoring, relative to no pruning")
  axes.set_ylabel("accuracy, with 95% intervals")
  for row in front:
    _label(axes, row, above=True)
  for row in run:
    if row["budget"] is None and row not in front:
      _label(axes, row, above=False)
  _finish(axes)
  _legend(figure, rows, styles, extra=[
    ("no pruning", {"marker": "*", "color": "#000000", "linestyle": (0, (6, 4)), "linewidth": 0.8, "markersize": 9}),
    ("not beaten (front)", {"color": "#222222", "alpha": 0.35, "linewidth": 2}),
  ])  # fmt: skip
  figures.save(path, figure)


def plot_types(path: pathlib.Path, rows: Sequence[Row]) -> None:
  """Draws accuracy against image tokens a layer, a panel a type of question."""
  types = types_of(rows)
  num_columns = min(3, len(types))
  num_rows = -(-len(types) // num_columns)
  figure = Figure(figsize=(4.2 * num_columns, 3.3 * num_rows), layout="constrained")
  panels = figure.subplots(num_rows, num_columns, sharex=True, squeeze=False).ravel()
  none, blind = _row(rows, REFERENCE), _row(rows, QUESTION_ONLY)
  styles = styles_of(rows)
  for axes, type in zip(panels, types, strict=False):
    value = f"{BY_TYPE}{type}"
    _draw(axes, rows, "tokens_updated", value, styles, bars=False)
    axes.axhline(none[value], color="#000000", linewidth=0.8, linestyle=(0, (6, 4)), zorder=0)
    axes.axhline(blind[value], color="#888888", linewidth=0.8, linestyle=":", zorder=0)
    axes.set_title(type, loc="left", fontsize=11, fontweight="bold")
    axes.set_xscale("log")
    budgets = sorted({row["budget"] for row in _pruned(rows) if row["budget"]})
    ticks = budgets or sorted({row["tokens_updated"] for row in _pruned(rows)})
    axes.xaxis.set_major_locator(matplotlib.ticker.FixedLocator(ticks))
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    _percent(axes.yaxis)
    _finish(axes)
  for axes in panels[len(types) :]:
    axes.set_axis_off()
  figure.supxlabel("image tokens a layer, on average", fontsize=10)
  figure.supylabel("accuracy", fontsize=10)
  _legend(figure, rows, styles, extra=[
    ("no pruning", {"color": "#000000", "linestyle": (0, (6, 4)), "linewidth": 0.8}),
    ("question only", {"color": "#888888", "linestyle": ":", "linewidth": 0.8}),
  ])  # fmt: skip
  figures.save(path, figure)


def _draw(axes: Axes, rows: Sequence[Row], x: str, y: str, styles: dict[str, Style], *, bars: bool) -> None:
  lines = collections.defaultdict(list)
  for row in _pruned(rows):
    style = styles[row["method"]]
    _point(axes, row, x, y, style, filled=row["budget"] is not None, bars=bars)
    if row["budget"] is not None:
      lines[row["method"]].append(row)
  for method, own in lines.items():
    own = sorted(own, key=lambda row: row[x])
    style = styles[method]
    axes.plot(
      [row[x] for row in own], [row[y] for row in own], color=style.colour, linewidth=1.1, alpha=0.75, zorder=2,
      linestyle="--" if "@" in method else "-",
    )  # fmt: skip


def _point(axes: Axes, row: Row, x: str, y: str, style: Style, *, filled: bool, bars: bool) -> None:
  if bars:
    axes.plot([row[x]] * 2, [row[f"{y}_low"], row[f"{y}_high"]], color=style.colour, linewidth=1, alpha=0.3, zorder=1.5)
  axes.plot(row[x], row[y], zorder=3, linestyle="none", **_marker(style, filled=filled))


def _marker(style: Style, *, filled: bool) -> dict:
  outline = style.marker in "x+1"
  return {
    "marker": style.marker,
    "color": style.colour,
    "markersize": 8 if style.marker == "*" else 6.5,
    "markerfacecolor": style.colour if filled else "white",
    "markeredgecolor": style.colour if outline or not filled else "white",
    "markeredgewidth": 1.8 if outline else 1.4 if not filled else 0.5,
  }


def _label(axes: Axes, row: Row, *, above: bool) -> None:
  axes.annotate(
    row["label"],
    (row["all_token_flops"], row["accuracy"]),
    (3, 8) if above else (7, -4),
    textcoords="offset points",
    fontsize=8.5,
    zorder=5,
    bbox={"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": "none", "alpha": 0.75},
  )


def _legend(figure: Figure, rows: Sequence[Row], styles: dict[str, Style], *, extra: list[tuple[str, dict]]) -> None:
  """A legend right of the figure, grouped by where methods act."""
  entries = [(Line2D([], [], **look), label) for label, look in extra]
  methods = list(dict.fromkeys((row["method"], row["budget"] is not None) for row in _pruned(rows)))
  for place in PALETTES:
    own = [(method, budget) for method, budget in methods if styles[method].place == place]
    if own:
      entries.append((Line2D([], [], linestyle="none"), f"$\\bf{{{place.replace(' ', '~')}}}$"))
    for method, budget in own:
      style = styles[method]
      line = ("--" if "@" in method else "-") if budget else "none"
      look = {"linestyle": line, **_marker(style, filled=budget)}
      entries.append((Line2D([], [], **look), method if budget else f"{method}, as set"))
  figure.legend(
    *zip(*entries, strict=True), loc="center left", bbox_to_anchor=(1.0, 0.5) if figure.get_layout_engine() else (0.91, 0.5),
    frameon=False, fontsize=9, handlelength=2.6,
  )  # fmt: skip


def _percent(axis: matplotlib.axis.Axis) -> None:
  axis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))


def _finish(axes: Axes) -> None:
  axes.spines[["top", "right"]].set_visible(False)
  axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
  axes.set_axisbelow(True)
