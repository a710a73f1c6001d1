"""Questions to browse: what every cell kept of their pictures and answered, and a figure of some at one budget."""

import collections
import pathlib
import textwrap
import warnings
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.compare.comparison import Comparison
from experiments.compare.grid import REFERENCE, Cell
from experiments.compare.report import Example, Shown
from experiments.question_sets import Question, is_right
from himap_jax.families.family import Processor
from himap_jax.run.drawing import fade
from himap_jax.run.pictures import load_image

COLUMNS = 9
RIGHT, WRONG = "#1a7f37", "#c1121f"


def choose(questions: Sequence[Question], num_examples: int) -> list[Question]:
  """The first questions of every type in turns, each about a picture that no other is about."""
  by_type = collections.defaultdict(collections.deque)
  for question in questions:
    by_type[question.type].append(question)
  chosen: dict[pathlib.Path, Question] = {}
  while len(chosen) < num_examples and any(by_type.values()):
    for waiting in by_type.values():
      while waiting and waiting[0].image in chosen:
        waiting.popleft()
      if waiting and len(chosen) < num_examples:
        question = waiting.popleft()
        chosen[question.image] = question
  return list(chosen.values())


def collect(questions: Sequence[Question], comparison: Comparison, processor: Processor) -> list[Example]:
  """What every cell that has run did with some questions; one that it could not answer is left out."""
  examples = []
  for question in questions:
    shown = {}
    for cell in comparison.cells:
      row = comparison.answers.get(cell.label, {}).get(question.id)
      if row is not None and row["error"] is None:
        layers = [stage.layer for stage in cell.schedule.stages]
        shown[cell.label] = Shown(row["answer"], list(zip(layers, row["kept"], strict=True)))
    if shown:
      picture = processor.picture(processor.prepare(load_image(question.image), question.question))
      examples.append(Example(picture, processor.patch_grid, question.question, question.answer, question.type, shown))
  return examples


def cells_to_show(cells: Sequence[Cell]) -> list[str]:
  """Labels of no pruning and of all cells at one budget: the lowest of those that most methods reach."""
  reached = collections.Counter(cell.budget for cell in cells if cell.budget is not None and cell.schedule is not None)
  if not reached:
    return [cell.label for cell in cells if cell.schedule is not None]
  budget = max(reached, key=lambda budget: (reached[budget], -budget))
  return [c.label for c in cells if c.label == REFERENCE or (c.budget == budget and c.schedule is not None)]


def draw_strips(path: pathlib.Path, examples: Sequence[Example], labels: Sequence[str]) -> None:
  """Draws a block for every example: the picture as each cell's last layers see it, with its answer below."""
  if not examples:
    return
  lines, columns = -(-len(labels) // COLUMNS), min(COLUMNS, len(labels))
  figure = Figure(figsize=(1.55 * columns, (1.95 * lines + 0.45) * len(examples)), layout="constrained")
  blocks = figure.subfigures(len(examples), 1, squeeze=False).ravel()
  for block, example in zip(blocks, examples, strict=True):
    block.suptitle(f"{example.question}  —  {example.answer}", x=0.005, ha="left", fontsize=11, fontweight="bold")
    panels = block.subplots(lines, columns, squeeze=False).ravel()
    for axes in panels:
      axes.set_axis_off()
    for axes, label in zip(panels, labels, strict=False):
      _panel(axes, example, label)
  FigureCanvasAgg(figure)
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Glyph .* missing from font")  # an answer in such a script is drawn as boxes
    figure.savefig(path, dpi=110)


def _panel(axes: Axes, example: Example, label: str) -> None:
  shown = example.cells.get(label)
  axes.set_title(label, fontsize=8.5, pad=3)
  if shown is None:
    return
  stages = sorted(shown.stages, key=lambda stage: stage[0])
  axes.imshow(fade(example.picture, stages[-1][1], example.grid) if stages else example.picture)
  right = is_right(shown.answer, example.answer)
  answer = textwrap.shorten(shown.answer, 22, placeholder="…") or "(nothing)"
  axes.text(
    0.5, -0.04, f"{'✓' if right else '✗'} {answer}", transform=axes.transAxes, ha="center", va="top",
    fontsize=8.5, color=RIGHT if right else WRONG,
  )  # fmt: skip
