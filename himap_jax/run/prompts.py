"""Prompts from JSONL files, and their output rows."""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping
from typing import Any

from himap_jax.errors import UserError
from himap_jax.families.examples import IMAGE_TAG
from himap_jax.families.family import Message

ROLES = ("system", "user", "assistant")
IMAGE_FIELDS = ("image", "url", "path", "base64")

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True)
class Prompt:
  """One row of a prompt file: a question about images, or an error.

  Attributes:
    id: the row's own id, or `line:<n>` if it is missing or repeated. Ids are compared as text: 1 is "1".
    images: as given in the row; see `run.sources`.
    question: a text, or the messages of a conversation.
    error: why the row cannot be answered, with its line number; None if it can.
  """

  id: str | int
  images: tuple[str, ...] = ()
  question: str | tuple[Message, ...] = ""
  error: str | None = None

  @property
  def key(self) -> str:
    """The id as text, unique in its file."""
    return str(self.id)

  @property
  def question_text(self) -> str:
    """The question, as one text."""
    return self.question if isinstance(self.question, str) else json.dumps(self.question)

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
  one or a list, or absent. Instead of both, `"messages"` is a conversation in the form of OpenAI or transformers. Other
  fields and blank lines are ignored. Of rows that share an id, the first keeps it and the others become errors.

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
      prompts[number] = Prompt(row_id, *_content(record))
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


def _content(record: Mapping[str, Any]) -> tuple[tuple[str, ...], str | tuple[Message, ...]]:
  """Images and question of a row."""
  if record.get("messages") is None:
    return _images(record), _text(record, "question", "text")
  for name in ("question", "text", "image"):
    if record.get(name) is not None:
      raise _BadRow(f'"{name}" and "messages" together')
  return read_messages(record["messages"])


def _images(record: Mapping[str, Any]) -> tuple[str, ...]:
  given = record.get("image")
  if given is None:
    return ()
  if not isinstance(given, list):
    return (_text(record, "image", expected="a string or a list of strings"),)
  return tuple(_text({"image": image}, "image", expected="a list of strings") for image in given)


def read_messages(messages: Any) -> tuple[tuple[str, ...], tuple[Message, ...]]:
  """Images and messages of a conversation in the form of OpenAI or transformers; raises `UserError` if malformed."""
  if not isinstance(messages, list) or not messages:
    raise _BadRow('"messages" must be a list of messages')
  images: list[str] = []
  read = []
  for number, message in enumerate(messages, start=1):
    where = f"message {number}"
    if not isinstance(message, dict) or message.get("role") not in ROLES:
      raise _BadRow(f"{where} must be an object whose role is {', '.join(ROLES)}")
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
      raise _BadRow(f"{where}: its content must be a text or a list of parts")
    texts = []
    for part in parts:
      if part.get("type") == "text":
        texts.append(_text(part, "text", expected="a string", where=f"{where}: ", may_be_empty=True))
      elif part.get("type") in ("image", "image_url"):
        named = part["image_url"] if isinstance(part.get("image_url"), dict) else part
        images.append(_text(named, *IMAGE_FIELDS, where=f"{where}: "))
        texts.append(IMAGE_TAG)
      else:
        raise _BadRow(f"{where}: a part's type must be text, image or image_url, not {part.get('type')!r}")
    read.append(Message(message["role"], "".join(texts)))
  if read[-1].role != "user":
    raise _BadRow("the last message must be the user's")
  if any(message.role == "system" for message in read[1:]):
    raise _BadRow("only the first message may be the system's")
  return tuple(images), tuple(read)


def _text(
  record: Mapping[str, Any], *names: str, expected: str = "a string", where: str = "", may_be_empty: bool = False
) -> str:
  """The text of the first of these fields that is there; `where` begins the messages about it."""
  name, value = _field(record, *names, where=where)
  if not isinstance(value, str):
    raise _BadRow(f'{where}"{name}" must be {expected}, not {_kind(value)}')
  if not value.strip() and not may_be_empty:
    raise _BadRow(f'{where}"{name}" is empty')
  if any("\ud800" <= character <= "\udfff" for character in value):
    raise _BadRow(f'{where}"{name}" has an unpaired surrogate, which is not text')
  return value


def _field(record: Mapping[str, Any], *names: str, where: str = "") -> tuple[str, Any]:
  for name in names:
    if record.get(name) is not None:
      return name, record[name]
  raise _BadRow(f"{where}{' or '.join(json.dumps(name) for name in names)} is missing")


def _kind(value: Any) -> str:
  kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
  return kinds.get(type(value), "null")


def _line_id(number: int, owner: Mapping[str, int]) -> str:
  name = f"line:{number}"
  while name in owner:
    name += "'"
  return name
