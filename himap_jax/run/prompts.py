"""Prompts from the rows of a source, and their output rows."""

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from himap_jax.errors import UserError, check_text
from himap_jax.families.family import ROLES, Message, problem_of
from himap_jax.families.prompts import IMAGE_TAG
from himap_jax.run.records import BadRow, Record, Records, check_readable, kind_of

IMAGE_FIELDS = ("image", "url", "path", "base64", "image_url")
MOST_FIELDS = 100

_NUMBERS = {"max_new_tokens": int, "temperature": float, "top_p": float}
_OPTIONS = (*_NUMBERS, "stop")


@dataclasses.dataclass(frozen=True)
class Options:
  """What a row asks of its answer; where a field is None the flags hold.

  Attributes:
    stop: the answer ends before the first of these texts.
  """

  max_new_tokens: int | None = None
  temperature: float | None = None
  top_p: float | None = None
  stop: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Prompt:
  """One row of a source: a question about images, or an error.

  Attributes:
    id: the row's own id, or its label (`line:<n>`) if it is missing or repeated. Ids are compared as text: 1 is "1".
    images: as given in the row; see `run.sources`.
    question: a text, or the messages of a conversation.
    error: why the row cannot be answered, with its place; None if it can.
  """

  id: str | int
  images: tuple[str | bytes, ...] = ()
  question: str | tuple[Message, ...] = ""
  options: Options = Options()
  error: str | None = None

  @property
  def key(self) -> str:
    """The id as text, unique in its file."""
    return str(self.id)

  @property
  def asked(self) -> str:
    """All that decides the answer besides the pictures, as one text: the question, and the row's own options."""
    if self.options != Options():
      return json.dumps([self.question, *dataclasses.astuple(self.options)])
    if not isinstance(self.question, str):
      return json.dumps(self.question)
    return json.dumps([self.question]) if self.question.startswith("[") else self.question  # which is no such list

  @property
  def file_name(self) -> str:
    """The id as a file name; with a digest if characters had to be replaced."""
    name = re.sub(r"[^\w.-]", "_", self.key, flags=re.ASCII)[:100]
    return name if name == self.key else f"{name}-{hashlib.sha256(self.key.encode()).hexdigest()[:12]}"

  def row(self, digest: str, *, answer: str | None = None, error: str | None = None, **more: Any) -> dict[str, Any]:
    """The prompt's output row; for `digest` see `himap_jax.run.contract`."""
    return {"id": self.id, "answer": answer, "error": error, "digest": digest, **more}


@dataclasses.dataclass(frozen=True)
class Prompts:
  """Prompts that are read each time they are asked for, and never held.

  Attributes:
    keys: the ids of all as text, in their order.
    where: reads those for which a flag is true, of a flag for each; raises `UserError` if they cannot be read any more.
    ignored: names of fields that are ignored, the first of them.
  """

  keys: Sequence[str]
  where: Callable[[Bool[np.ndarray, "N"]], Iterator[Prompt]]
  ignored: tuple[str, ...] = ()

  def __len__(self) -> int:
    return len(self.keys)

  def __iter__(self) -> Iterator[Prompt]:
    return self.where(np.ones(len(self), bool))

  @classmethod
  def of(cls, prompts: Sequence[Prompt]) -> "Prompts":
    """Prompts that are held, with different ids."""
    return cls([prompt.key for prompt in prompts], lambda wanted: itertools.compress(prompts, wanted))


@dataclasses.dataclass(frozen=True)
class Columns:
  """For each of our fields the names that a row may have for it; the first that is there counts.

  Without a name there are no pictures or messages, and ids are the rows' labels.
  """

  id: tuple[str, ...] = ("id", "question_id")
  image: tuple[str, ...] = ("image",)
  question: tuple[str, ...] = ("question", "text")
  messages: tuple[str, ...] = ("messages",)

  @classmethod
  def parse(cls, texts: Sequence[str]) -> "Columns":
    """From `ours:theirs`, or `image:` and `id:` alone, for no name; raises `UserError` for anything else."""
    known, own = [field.name for field in dataclasses.fields(cls)], {}
    for text in texts:
      ours, colon, theirs = (part.strip() for part in text.partition(":"))
      if ours not in known:
        raise UserError(
          f"--columns: unknown field {ours!r} in {text!r}; known: {', '.join(known)}, as in id:question_id"
        )
      if not colon or ours in own or (ours == "question" and not theirs):
        raise UserError(f"--columns: {text!r} does not name one column for {ours}, as in {ours}:theirs")
      own[ours] = (theirs,) if theirs else ()
    return cls(**own)

  def check(self, there: Collection[str], source: str) -> None:
    """Raises `UserError` if a table lacks a column."""
    is_chat = bool(self.messages) and (self.messages != Columns.messages or not set(self.messages).isdisjoint(there))
    for field in ("id", "messages") if is_chat else ("id", "question", "image"):
      names = getattr(self, field)
      if names and set(names).isdisjoint(there):
        found = ", ".join(" ".join(name.split()) for name in there)  # an open quote takes in the lines that follow
        none = {"id": "to number the rows", "image": "if there are no pictures"}
        more = f", or --columns={field}: {none[field]}" if field in none else ""
        raise UserError(
          f"{source} has no column {' or '.join(names)}; it has {found}; name the one to use with "
          f"--columns={field}:NAME{more}"
        )

  def names(self, *fields: str) -> list[str]:
    return [name for field in fields for name in getattr(self, field)]


def read_prompts(records: Records, columns: Columns = Columns()) -> Prompts:
  """The prompts of rows, which are read once for their ids.

  A row is `{"id", "image", "question"}` or, as in LLaVA's question files, `{"question_id", "image", "text"}`; `image` is
  one or a list, or absent. Instead of both, `"messages"` is a conversation in the form of OpenAI or transformers. A row
  may have fields of `Options`; others are ignored. Of rows that share an id, the first keeps it and the others become
  errors.

  Raises:
    UserError: the rows cannot be read, there are none, no line is a row, or a table lacks a column.
  """
  known = fields = [*columns.names("id", "question", "messages", "image"), *_OPTIONS]
  if records.columns is not None:
    columns.check(records.columns, records.name)
    fields = [name for name in fields if name in records.columns]
  ids = [name for name in fields if name in columns.id] or fields[:1]
  there = dict.fromkeys(records.columns or ())
  keys, bad = _keys(_noting_fields(records.read(ids), there), columns)
  if not keys:
    raise UserError(f"the prompt file {records.name} is empty")
  if not there:
    raise UserError(f"no line of the prompt file {records.name} is a JSON object with fields; {bad[0]}")

  def where(wanted: Bool[np.ndarray, "N"]) -> Iterator[Prompt]:
    rows = records.read(fields, wanted)
    for position in np.flatnonzero(wanted).tolist():
      place, label, own = next(rows, ("", "", None))
      if position in bad:
        yield Prompt(keys[position], error=bad[position])
        continue
      try:
        row_id = _id(own, columns, label)
      except BadRow:
        row_id = None
      if own is None or str(row_id) != keys[position]:
        raise UserError(f"{records.name} was changed while it was read; start again")
      try:
        check_readable(own, fields)
        yield Prompt(row_id, *_content(own, columns), _options(own))
      except BadRow as error:
        yield Prompt(row_id, error=f"{place}: {error}")

  return Prompts(keys, where, tuple(name for name in there if name not in known))


def _noting_fields(rows: Iterator[Record], there: dict[str, None]) -> Iterator[Record]:
  """The same rows; notes the names of their fields, `MOST_FIELDS` at most."""
  for row in rows:
    if isinstance(row.fields, dict) and len(there) < MOST_FIELDS:
      there.update(dict.fromkeys(row.fields))
    yield row


def _keys(rows: Iterator[Record], columns: Columns) -> tuple[list[str], dict[int, str]]:
  """The ids of rows as text, and the errors, by position, of rows without an id of their own: their label is the id."""
  keys: list[str] = []
  owner: dict[str, str] = {}
  bad: dict[int, str] = {}
  for position, (place, label, own) in enumerate(rows):
    try:
      row_id = _id(own, columns, label)
      if str(row_id) in owner:
        raise BadRow(f"the id {json.dumps(row_id)} was already used on {owner[str(row_id)]}")
      owner[str(row_id)] = place
      keys.append(str(row_id))
    except BadRow as error:
      bad[position] = f"{place}: {error}"
      keys.append(label)
  for position in bad:
    while keys[position] in owner:
      keys[position] += "'"
  return keys, bad


def _id(record: Mapping[str, Any] | BadRow | None, columns: Columns, label: str) -> str | int:
  if not isinstance(record, dict):
    raise record or BadRow("is missing")
  if not columns.id:
    return label
  check_readable(record, columns.id)
  _, row_id = _field(record, *columns.id)
  return row_id if type(row_id) is int else _text(record, *columns.id, expected="a string or an integer")


def _content(record: Mapping[str, Any], columns: Columns) -> tuple[tuple[str | bytes, ...], str | tuple[Message, ...]]:
  """Images and question of a row."""
  messages = next((record[name] for name in columns.messages if record.get(name) is not None), None)
  if messages is None:
    return _images(record, columns), _text(record, *columns.question)
  for name in columns.names("question", "image"):
    if record.get(name) is not None:
      raise BadRow(f'"{name}" and "messages" together')
  return read_messages(messages)


def _options(record: Mapping[str, Any]) -> Options:
  """The options of a row; numbers may be text, as in CSV."""
  numbers: dict[str, Any] = {}
  for name, kind in _NUMBERS.items():
    value = record.get(name)
    if value is None:
      continue
    try:
      if isinstance(value, bool) or not isinstance(value, int | float | str) or kind(value) != float(value):
        raise ValueError
    except (ValueError, OverflowError):
      raise BadRow(f'"{name}" must be {"an integer" if kind is int else "a number"}, not {value!r}') from None
    numbers[name] = kind(value)
  if numbers.get("max_new_tokens", 1) < 1:
    raise BadRow(f'"max_new_tokens" must be at least 1, but is {numbers["max_new_tokens"]}')
  stop = record.get("stop")
  texts = [] if stop is None else stop if isinstance(stop, list) else [stop]
  if not all(isinstance(text, str) and text for text in texts):
    raise BadRow('"stop" must be a text or a list of texts, none of them empty')
  return Options(**numbers, stop=tuple(texts))


def _images(record: Mapping[str, Any], columns: Columns) -> tuple[str | bytes, ...]:
  name = next((name for name in columns.image if record.get(name) is not None), None)
  if name is None:
    return ()
  given = record[name]
  if not isinstance(given, list):
    return (_picture({name: given}, name, expected="a string or a list of strings"),)
  return tuple(_picture({name: image}, name, expected="a list of strings") for image in given)


def _picture(record: Mapping[str, Any], *names: str, expected: str = "a string", where: str = "") -> str | bytes:
  """A picture's name or bytes, also in the form of `datasets`: `{"bytes", "path"}`."""
  name, value = _field(record, *names, where=where)
  if isinstance(value, dict) and value.keys() & {"bytes", "path"}:
    return _picture(value, "bytes", "path", where=f'{where}"{name}": ')
  if isinstance(value, bytes):
    return value
  return _text({name: value}, name, expected=expected, where=where)


def read_messages(messages: Any) -> tuple[tuple[str | bytes, ...], tuple[Message, ...]]:
  """Images and messages of a conversation in the form of OpenAI or transformers; raises `UserError` if malformed."""
  if not isinstance(messages, list) or not messages:
    raise BadRow('"messages" must be a list of messages')
  images: list[str | bytes] = []
  read = []
  for number, message in enumerate(messages, start=1):
    where = f"message {number}"
    if not isinstance(message, dict) or message.get("role") not in ROLES:
      raise BadRow(f"{where} must be an object whose role is {', '.join(ROLES)}")
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
      raise BadRow(f"{where}: its content must be a text or a list of parts")
    texts = []
    for part in parts:
      if part.get("type") == "text":
        texts.append(_text(part, "text", expected="a string", where=f"{where}: ", may_be_empty=True))
      elif part.get("type") in ("image", "image_url"):
        named = part["image_url"] if isinstance(part.get("image_url"), dict) else part
        images.append(_picture(named, *IMAGE_FIELDS, where=f"{where}: "))
        texts.append(IMAGE_TAG)
      else:
        raise BadRow(f"{where}: a part's type must be text, image or image_url, not {part.get('type')!r}")
    read.append(Message(message["role"], "".join(texts)))
  if problem := problem_of(read):
    raise BadRow(problem)
  return tuple(images), tuple(read)


def _text(
  record: Mapping[str, Any], *names: str, expected: str = "a string", where: str = "", may_be_empty: bool = False
) -> str:
  """The text of the first of these fields that is there; `where` begins the messages about it."""
  name, value = _field(record, *names, where=where)
  if not isinstance(value, str):
    raise BadRow(f'{where}"{name}" must be {expected}, not {kind_of(value)}')
  if not value.strip() and not may_be_empty:
    raise BadRow(f'{where}"{name}" is empty')
  check_text(f'{where}"{name}"', value, BadRow)
  return value


def _field(record: Mapping[str, Any], *names: str, where: str = "") -> tuple[str, Any]:
  for name in names:
    if record.get(name) is not None:
      return name, record[name]
  raise BadRow(f"{where}{' or '.join(json.dumps(name) for name in names)} is missing")
