"""The comparison as one HTML file: a table of figures, and what each method keeps of pictures."""

import base64
import dataclasses
import io
import math
import numbers
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jinja2
import numpy as np
from PIL import Image

from experiments.question_sets import is_right
from himap_jax.run.drawing import kept_mask


class Column(NamedTuple):
  """A column of the table: its key in the rows, its heading, and how its values are written, 0.25 as 25.0% in `percent`."""

  name: str
  label: str
  kind: Literal["text", "number", "percent"]


class Shown(NamedTuple):
  """What one method did with one question: the answer, and for each pruning stage its layer and the image tokens it keeps."""

  answer: str
  stages: Sequence[tuple[int, Sequence[int]]]


@dataclasses.dataclass(frozen=True)
class Example:
  """One question about one picture, as the model saw it, with its true answer, and what every method did with it.

  Attributes:
    grid: (rows, columns) of image tokens.
    cells: method and budget, as in `himap 25%` → what it did. The reader can filter by a last word that is a number.
  """

  picture: Image.Image
  grid: tuple[int, int]
  question: str
  answer: str
  type: str
  cells: Mapping[str, Shown]


def write_report(
  path: str | Path,
  columns: Sequence[Column],
  rows: Sequence[Mapping[str, Any]],
  examples: Sequence[Example],
  *,
  title: str,
  num_layers: int | None = None,
) -> None:
  """Writes the report: one file that loads nothing from elsewhere.

  Args:
    path: the file to write.
    columns: of the table; the first names the method, and a row named `none` there is set off.
    rows: column name → value, None or nothing where it is missing; `note` stands in place of missing figures.
    examples: the questions to browse.
    title: of the report.
    num_layers: the decoder's; without it the slider ends at the last layer where anything is pruned.

  Raises:
    ValueError: a kept image token is outside its example's grid, or a stage's layer is outside the decoder.
  """
  layers = [layer for example in examples for shown in example.cells.values() for layer, _ in shown.stages]
  last_layer = max(layers, default=0) if num_layers is None else num_layers - 1
  if any(not 0 <= layer <= last_layer for layer in layers):
    raise ValueError(f"a stage's layer is outside the decoder's layers, 0 to {last_layer}")
  names = [*(column.name for column in columns), "note"]
  data = {
    "columns": [column._asdict() for column in columns],
    "rows": [{name: _plain(row.get(name)) for name in names} for row in rows],
    "lastLayer": last_layer,
    "examples": [_example(example) for example in examples],
  }
  loader = jinja2.FileSystemLoader(Path(__file__).parent)
  environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
  page = environment.get_template("report.html").render(title=title, data=data)
  Path(path).write_text(page, encoding="utf-8")


def _plain(value: Any) -> str | int | float | None:
  if value is None or isinstance(value, str):
    return value
  if isinstance(value, numbers.Integral):
    return int(value)
  return float(value) if math.isfinite(value) else None


def _example(example: Example) -> dict[str, Any]:
  fields = {name: getattr(example, name) for name in ("grid", "question", "answer", "type")}
  cells = [
    {
      "name": name,
      "answer": shown.answer,
      "right": is_right(shown.answer, example.answer),
      "stages": [
        [layer, _bits(kept, example.grid)] for layer, kept in sorted(shown.stages, key=lambda stage: stage[0])
      ],
    }
    for name, shown in example.cells.items()
  ]
  return {"picture": _data_uri(example.picture), **fields, "cells": cells}


def _bits(kept: Sequence[int], grid: tuple[int, int]) -> str:
  """One bit per image token, the lowest of each byte first, in base64."""
  return base64.b64encode(np.packbits(kept_mask(kept, grid), bitorder="little").tobytes()).decode()


def _data_uri(picture: Image.Image) -> str:
  """The picture as JPEG or PNG, whichever is smaller."""
  encoded = {}
  for name, options in (("png", {"optimize": True}), ("jpeg", {"quality": 88})):
    file = io.BytesIO()
    picture.convert("RGB").save(file, name, **options)
    encoded[name] = file.getvalue()
  name = min(encoded, key=lambda name: len(encoded[name]))
  return f"data:image/{name};base64,{base64.b64encode(encoded[name]).decode()}"
