"""The comparison as one HTML file: a table of figures, and the patches and answers of every cell."""

import base64
import collections
import dataclasses
import io
import math
import numbers
import operator
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jinja2
import numpy as np
from jaxtyping import Bool
from PIL import Image

from experiments.compare.comparison import Row
from experiments.compare.grid import REFERENCE, Cell
from experiments.question_sets import Question, is_right
from experiments.shared.subject import Subject


class Column(NamedTuple):
  """A column of the table: key in the rows, heading, and format; `percent` writes 0.25 as 25.0%, `p` as 0.250."""

  name: str
  label: str
  kind: Literal["text", "number", "percent", "p"]


class Shown(NamedTuple):
  """A cell's result for one question: the answer, and the layer and kept image tokens of each pruning stage."""

  answer: str
  stages: Sequence[tuple[int, Sequence[int]]]


@dataclasses.dataclass(frozen=True)
class Example:
  """A question, its picture as the model saw it, and every cell's result.

  `grid` is (rows, columns) of image tokens. `cells` are named by method and budget, such as `himap 25%`; the reader can
  filter by a final number.
  """

  picture: Image.Image
  grid: tuple[int, int]
  question: Question
  cells: Mapping[str, Shown]

  def kept_mask(self, kept: Sequence[int]) -> Bool[np.ndarray, "rows columns"]:
    """Mask of the kept image tokens; raises `ValueError` if one is outside the grid."""
    rows, columns = self.grid
    if any(not 0 <= index < rows * columns for index in kept):
      raise ValueError(f"a kept image token is outside the {rows} × {columns} grid of patches")
    return np.isin(np.arange(rows * columns), list(kept)).reshape(self.grid)


def choose(questions: Sequence[Question], num_examples: int) -> list[Question]:
  """Takes the first questions of every type in turn, each about another picture."""
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


def collect(
  questions: Sequence[Question],
  shown_rows: Mapping[str, Mapping[str, Mapping[str, Any]]],
  cells: Sequence[Cell],
  subject: Subject,
) -> list[Example]:
  """Results of all cells that have run on some questions; failed answers are left out.

  `shown_rows` are, by label and question id, output rows with kept image tokens.

  There is nothing to show of a model whose image tokens form no grid.
  """
  examples = []
  if subject.processor.num_image_tokens != math.prod(subject.processor.patch_grid):
    return examples
  for question in questions:
    shown = {}
    for cell in cells:
      row = shown_rows.get(cell.label, {}).get(question.id)
      if row is not None and row["error"] is None:
        layers = [stage.layer for stage in cell.schedule.stages]
        shown[cell.label] = Shown(row["answer"], list(zip(layers, row["kept"], strict=True)))
    if shown:
      (view,) = subject.processor.views(subject.example(question))
      examples.append(Example(view.picture, subject.processor.patch_grid, question, shown))
  return examples


def cells_to_show(cells: Sequence[Cell]) -> list[str]:
  """Labels of no pruning and of all cells at the lowest of the budgets that most methods reach."""
  run = [cell for cell in cells if cell.schedule is not None]
  reached = collections.Counter(cell.budget for cell in run if cell.budget is not None)
  budget = max(reached, key=lambda budget: (reached[budget], -budget), default=None)
  return [cell.label for cell in run if cell.label == REFERENCE or cell.budget == budget]


def render(
  columns: Sequence[Column], rows: Sequence[Row], examples: Sequence[Example], *, title: str, num_layers: int
) -> str:
  """The report's HTML text, a single file that loads nothing from elsewhere.

  The first column names the method, and a row named `none` is set off; a row's `note` replaces missing figures. Raises
  `ValueError` for a kept image token outside its example's grid, or a stage outside the decoder.
  """
  layers = [layer for example in examples for shown in example.cells.values() for layer, _ in shown.stages]
  if any(not 0 <= layer < num_layers for layer in layers):
    raise ValueError(f"a stage's layer is outside the decoder's layers, 0 to {num_layers - 1}")
  names = [*(column.name for column in columns), "note"]
  data = {
    "columns": [column._asdict() for column in columns],
    "rows": [{name: _plain(row.get(name)) for name in names} for row in rows],
    "lastLayer": num_layers - 1,
    "examples": [_example(example) for example in examples],
  }
  loader = jinja2.FileSystemLoader(pathlib.Path(__file__).parent)
  environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
  return environment.get_template("report.html").render(title=title, data=data)


def _plain(value: Any) -> str | int | float | None:
  if value is None or isinstance(value, str):
    return value
  if isinstance(value, numbers.Integral):
    return int(value)
  return float(value) if math.isfinite(value) else None


def _example(example: Example) -> dict[str, Any]:
  def bits(kept: Sequence[int]) -> str:
    """One bit per image token, the lowest of each byte first, in base64."""
    return base64.b64encode(np.packbits(example.kept_mask(kept), bitorder="little").tobytes()).decode()

  cells = [
    {
      "name": name,
      "answer": shown.answer,
      "right": is_right(shown.answer, example.question.answer),
      "stages": [[layer, bits(kept)] for layer, kept in sorted(shown.stages, key=operator.itemgetter(0))],
    }
    for name, shown in example.cells.items()
  ]
  asked = {name: getattr(example.question, name) for name in ("question", "answer", "type")}
  return {"picture": _data_uri(example.picture), "grid": example.grid, **asked, "cells": cells}


def _data_uri(picture: Image.Image) -> str:
  """The picture as JPEG or PNG, whichever is smaller."""
  encoded = []
  for name, options in (("png", {"optimize": True}), ("jpeg", {"quality": 88})):
    file = io.BytesIO()
    picture.convert("RGB").save(file, name, **options)
    encoded.append(f"data:image/{name};base64,{base64.b64encode(file.getvalue()).decode()}")
  return min(encoded, key=len)
