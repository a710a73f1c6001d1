"""Prompt files: JSON lines in, prompts or row errors out."""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True)
class Prompt:
  """One question about one image.

  Attributes:
    id: the row's own id, unique in its file.
    image: path of the image as the row gives it.
    question: the question's text.
  """

  id: str | int
  image: str
  question: str


@dataclasses.dataclass(frozen=True)
class RowError:
  """A row that cannot be answered.

  Attributes:
    id: the row's own id, or `line:<n>` where it has none or another row has it.
    message: the line number and what is wrong with it.
  """

  id: str | int
  message: str


class _BadRow(ValueError):
  """What is wrong with a row."""


def read_prompts(path: str | os.PathLike[str]) -> list[Prompt | RowError]:
  """Reads a prompt file, one JSON object a line.

  A row is `{"id", "image", "question"}` or, as in LLaVA's question files,
  `{"question_id", "image", "text"}`. Other fields are ignored, and so are blank
  lines. The ids of the result are unique: of rows that share an id, the first
  has it and the others are errors. The ids 1 and "1" are different.

  Raises:
    ValueError: the file cannot be read, or has no row at all.
  """
  try:
    with open(path, "rb") as file:
      data = file.read()
  except (OSError, ValueError) as error:
    reason = getattr(error, "strerror", None) or error
    raise ValueError(f"cannot read the prompt file {path}: {reason}") from error
  lines = data.removeprefix(_BYTE_ORDER_MARK).split(b"\n")
  numbered = [(n, line) for n, line in enumerate(lines, start=1) if line.strip()]
  if not numbered:
    raise ValueError(f"the prompt file {path} is empty")

  owner: dict[str | int, int] = {}
  rows: list[tuple[int, Prompt | RowError | str]] = []
  for number, line in numbered:
    row_id = None
    row: Prompt | RowError | str
    try:
      record = _record(line)
      row_id = _claim(record, owner, number)
      row = Prompt(
        id=row_id,
        image=_text(record, "image"),
        question=_text(record, "question", "text"),
      )
    except _BadRow as error:
      message = f"line {number}: {error}"
      row = message if row_id is None else RowError(row_id, message)
    rows.append((number, row))

  return [RowError(_line_id(number, owner), row) if isinstance(row, str) else row for number, row in rows]


def _record(line: bytes) -> Mapping[str, Any]:
  try:
    record = json.loads(line.decode("utf-8"))
  except UnicodeDecodeError as error:
    raise _BadRow(f"not UTF-8: {error.reason} at byte {error.start + 1}") from error
  except json.JSONDecodeError as error:
    raise _BadRow(f"not valid JSON: {error.msg} at column {error.colno}") from error
  except (ValueError, RecursionError) as error:
    raise _BadRow(f"not valid JSON: {error}") from error
  if not isinstance(record, dict):
    raise _BadRow(f"not a JSON object but {_kind(record)}")
  return record


def _claim(record: Mapping[str, Any], owner: dict[str | int, int], number: int) -> str | int:
  row_id = _field(record, "id", "question_id")
  if isinstance(row_id, bool) or not isinstance(row_id, int):
    row_id = _text(record, "id", "question_id", expected="a string or an integer")
  if row_id in owner:
    raise _BadRow(f"the id {json.dumps(row_id)} was already used on line {owner[row_id]}")
  owner[row_id] = number
  return row_id


def _text(record: Mapping[str, Any], *names: str, expected: str = "a string") -> str:
  value = _field(record, *names)
  name = next(name for name in names if record.get(name) is not None)
  if not isinstance(value, str):
    raise _BadRow(f'"{name}" must be {expected}, not {_kind(value)}')
  if not value.strip():
    raise _BadRow(f'"{name}" is empty')
  if any("\ud800" <= character <= "\udfff" for character in value):
    raise _BadRow(f'"{name}" has an unpaired surrogate, which is not text')
  return value


def _field(record: Mapping[str, Any], *names: str) -> Any:
  for name in names:
    if record.get(name) is not None:
      return record[name]
  alternatives = " or ".join(f'"{name}"' for name in names)
  raise _BadRow(f"{alternatives} is missing")


def _kind(value: Any) -> str:
  kinds = {
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
    type(None): "null",
  }
  return kinds[type(value)]


def _line_id(number: int, owner: dict[str | int, int]) -> str:
  name = f"line:{number}"
  while name in owner:
    name += "'"
  return name
