"""Prompts from JSONL files, and their output rows."""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping
from typing import Any

from himap_jax.errors import UserError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True)
class Prompt:
  """One row of a prompt file: a question about images, or an error.

  Attributes:
    id: the row's own id, or `line:<n>` if it is missing or repeated. Ids are compared as text: 1 is "1".
    images: paths as given in the row.
    error: why the row cannot be answered, with its line number; None if it can.
  """

  id: str | int
  images: tuple[str, ...] = ()
  question: str = ""
  error: str | None = None

  @property
  def key(self) -> str:
    """The id as text, unique in its file."""
    return str(self.id)

  @property
  def file_name(self) -> str:
    """The id as a file name; with a digest if characters had to be replaced."""
    name = re.sub(r"[^\w.-]", "_", self.key, flags=re.ASCII)[:100]
    return name if name == self.key else f"{name}-{hashlib.sha256(self.key.encode()).hexdigest()[:12]}"

  def row(self, digest: str, *, answer: str | None = None, error: str | None = None, **more: Any) -> dict[str, Any]:
    """The prompt's output row; for `digest` see `himap_jax.run.contract`."""
    return {"id": self.id, "answer": answer, "error": error, "digest": digest, **more}


class _BadRow(UserError):
  """An error in one row."""


def read_prompts(path: str | os.PathLike[str]) -> list[Prompt]:
  """Reads a prompt file, one JSON object per line.

  A row is `{"id", "image", "question"}` or, as in LLaVA's question files, `{"question_id", "image", "text"}`; `image` is
  a path or a list of paths. Other fields and blank lines are ignored. Of rows that share an id, the first keeps it and the others become errors.

  Raises:
    UserError: the file cannot be read or has no rows.
  """
  try:
    with open(path, "rb") as file:
      data = file.read()
  except (OSError, ValueError) as error:
    reason = getattr(error, "strerror", None) or error
    raise UserError(f"cannot read the prompt file {path}: {reason}") from error
  lines = data.removeprefix(_BYTE_ORDER_MARK).split(b"\n")
  numbered = [(n, line) for n, line in enumerate(lines, start=1) if line.strip()]
  if not numbered:
    raise UserError(f"the prompt file {path} is empty")

  owner: dict[str, int] = {}
  prompts: dict[int, Prompt] = {}  # by line
  for number, line in numbered:
    row_id = ""
    try:
      record = _record(line)
      row_id = _claim(record, owner, number)
      prompts[number] = Prompt(row_id, _images(record), _text(record, "question", "text"))
    except _BadRow as error:
      prompts[number] = Prompt(row_id, error=f"line {number}: {error}")
  return [p if p.key else dataclasses.replace(p, id=_line_id(n, owner)) for n, p in prompts.items()]


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


def _claim(record: Mapping[str, Any], owner: dict[str, int], number: int) -> str | int:
  _, row_id = _field(record, "id", "question_id")
  if type(row_id) is not int:
    row_id = _text(record, "id", "question_id", expected="a string or an integer")
  if str(row_id) in owner:
    raise _BadRow(f"the id {json.dumps(row_id)} was already used on line {owner[str(row_id)]}")
  owner[str(row_id)] = number
  return row_id


def _images(record: Mapping[str, Any]) -> tuple[str, ...]:
  if not isinstance(record.get("image"), list):
    return (_text(record, "image", expected="a string or a list of strings"),)
  if not record["image"]:
    raise _BadRow('"image" is an empty list')
  return tuple(_text({"image": path}, "image", expected="a list of strings") for path in record["image"])


def _text(record: Mapping[str, Any], *names: str, expected: str = "a string") -> str:
  name, value = _field(record, *names)
  if not isinstance(value, str):
    raise _BadRow(f'"{name}" must be {expected}, not {_kind(value)}')
  if not value.strip():
    raise _BadRow(f'"{name}" is empty')
  if any("\ud800" <= character <= "\udfff" for character in value):
    raise _BadRow(f'"{name}" has an unpaired surrogate, which is not text')
  return value


def _field(record: Mapping[str, Any], *names: str) -> tuple[str, Any]:
  for name in names:
    if record.get(name) is not None:
      return name, record[name]
  raise _BadRow(f"{' or '.join(json.dumps(name) for name in names)} is missing")


def _kind(value: Any) -> str:
  kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
  return kinds.get(type(value), "null")


def _line_id(number: int, owner: Mapping[str, int]) -> str:
  name = f"line:{number}"
  while name in owner:
    name += "'"
  return name
