"""Rows of prompts from a file, a directory or the Hugging Face hub, read one after another and never held.

x.parquet  x.csv  any other file: JSONL
a directory that `datasets` saved, or of such files as the hub lays them out: one of its splits
owner/name: a data set on the hub, one of its splits, whose files are downloaded
"""

import collections
import contextlib
import csv
import dataclasses
import itertools
import json
import os
import pathlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import IO, Any, AnyStr, NamedTuple

import numpy as np
from jaxtyping import Bool

from checkpoints_convert.messages import first_line
from himap_jax.errors import UserError
from himap_jax.run import splits
from himap_jax.run.splits import KINDS

EXTRA = "pip install 'himap_jax[data]'"
BATCH_ROWS = 16  # that are in memory at a time, of a file with columns

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LABEL = re.compile(r"(line|row|.+\.\w+):[0-9]+", re.DOTALL)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_BUFFER_BYTES = 1 << 20  # of each column of a parquet file, whose row groups may be larger than memory
_MAX_CSV_FIELD = 1 << 28  # a quote that is not closed takes no more
_MAX_LINE_BYTES = 1 << 28
_HEAD_BYTES = 1 << 10
_NOT_TEXT = frozenset(range(32)) - frozenset(b"\t\n\f\r")


class BadRow(UserError):
  """An error in one row; in the place of a value, why it cannot be read."""


class _LongLineError(csv.Error):
  """A line of CSV is too long, and is not counted by its reader."""


class Record(NamedTuple):
  """One row.

  Attributes:
    place: where it is, for messages: `line 3`, `row 3`, or `row 3 of b.parquet` of several files.
    label: the same as an id: `line:3`, `row:3`, `b.parquet:3`.
    fields: its values by name, of which each may be a `BadRow`, or why there are none.
  """

  place: str
  label: str
  fields: dict[str, Any] | BadRow


def is_label(row_id: str) -> bool:
  """Whether an id has the form of a record's label."""
  return _LABEL.fullmatch(row_id) is not None


def check_readable(fields: Mapping[str, Any], names: Iterable[str]) -> None:
  """Raises `BadRow` if one of these values could not be read."""
  for name in names:
    if isinstance(fields.get(name), BadRow):
      raise BadRow(f'"{name}" is {fields[name]}')


# Yields the numbers and fields of a file's rows. Takes the file, the columns to read (None for all), and an iterator that
# tells of each row whether it is wanted.
_Read = Callable[[pathlib.Path, Collection[str] | None, Iterator[bool]], Iterator[tuple[int, dict[str, Any] | BadRow]]]


@dataclasses.dataclass(frozen=True)
class Records:
  """Rows that are read anew each time; raises `UserError` whenever a file cannot be read.

  Attributes:
    name: of all, for messages.
    columns: of all rows; None if each has its own.
  """

  name: str
  files: Sequence[pathlib.Path]
  columns: tuple[str, ...] | None
  unit: str
  read_file: _Read

  def read(
    self, columns: Collection[str] | None = None, wanted: Bool[np.ndarray, "N"] | None = None
  ) -> Iterator[Record]:
    """Yields rows in their order.

    Args:
      columns: those to read, where the rows have columns; all if absent.
      wanted: for every row whether to yield it; all if absent.
    """
    flags = itertools.repeat(True) if wanted is None else itertools.chain(wanted.tolist(), itertools.repeat(False))
    common = os.path.commonpath([path.parent for path in self.files])
    for path in self.files:
      file = path.relative_to(common)
      for number, fields in self.read_file(path, columns, flags):
        if len(self.files) == 1:
          yield Record(f"{self.unit} {number}", f"{self.unit}:{number}", fields)
        else:
          yield Record(f"{self.unit} {number} of {file}", f"{file}:{number}", fields)


def open_records(path: pathlib.Path, split: str | None = None) -> Records:
  """The rows of a file, a directory or a hub id, whose owner is no directory here.

  Args:
    split: of a directory or hub id; `configuration/split` where it has several configurations. Not needed if there is
      only one.

  Raises:
    UserError: there is no such thing, it cannot be read, or it has no such split.
  """
  suffix = path.suffix.lower()
  if suffix == ".tsv" and not path.is_dir():
    raise UserError(
      f"cannot read the prompt file {path}: tables end with .parquet or .csv, whose fields commas separate"
    )
  is_id = not path.parent.is_dir() and _HUB_ID.fullmatch(str(path)) and suffix not in itertools.chain(*KINDS.values())
  if path.is_dir() or is_id:
    with _needs_extra(path), _unreadable(path):
      own = splits.of_hub(str(path), split) if is_id else splits.of_directory(path, split)
    return _of_files(path, own.paths, own.kind)
  if split is not None and path.exists():
    raise UserError(f"--split={split}: {path} is a file; only directories and data sets of the hub have splits")
  if path.exists() and not path.is_file():
    raise UserError(f"cannot read the prompt file {path}: not a regular file, and prompts are read more than once")
  kind = next((kind for kind, suffixes in KINDS.items() if suffix in suffixes), "json")
  return _of_files(path, [path], kind)


def _of_files(name: pathlib.Path, files: Sequence[pathlib.Path], kind: str) -> Records:
  if not files:
    raise UserError(f"{name} has no rows")
  if kind == "json":
    _check_lines(files[0])
    return Records(str(name), files, None, "line", _read_lines)
  columns_of, read, unit = {
    "csv": (_csv_columns, _read_csv, "line"),
    "parquet": (_parquet_columns, _read_parquet, "row"),
    "arrow": (_arrow_columns, _read_arrow, "row"),
  }[kind]
  columns = [columns_of(path) for path in files]
  return Records(
    str(name), files, tuple(name for name in columns[0] if all(name in own for own in columns)), unit, read
  )


def _check_lines(path: pathlib.Path) -> None:
  """Raises `UserError` if a file is no JSONL at all, by its beginning."""
  with _unreadable(path), open(path, "rb") as file:
    head = file.read(_HEAD_BYTES).removeprefix(_BYTE_ORDER_MARK)
  if head.lstrip().startswith(b"["):
    raise UserError(f"the prompt file {path} is a JSON array; it must have one JSON object on each line")
  if not _NOT_TEXT.isdisjoint(head):
    raise UserError(f"the prompt file {path} is not text; tables end with .parquet or .csv, any other file is JSONL")


def _lines(file: IO[AnyStr], *ends: AnyStr) -> Iterator[AnyStr | None]:
  """Lines; None for one that is too long."""
  while line := file.readline(_MAX_LINE_BYTES + 1):
    is_long = len(line) > _MAX_LINE_BYTES
    yield None if is_long else line
    while is_long and line and not line.endswith(ends):
      line = file.readline(_MAX_LINE_BYTES)


def _too_long() -> str:
  return f"longer than {_MAX_LINE_BYTES >> 20} MiB"


def _read_lines(path: pathlib.Path, columns: Collection[str] | None, wanted: Iterator[bool]) -> Iterator[Any]:
  del columns
  with _unreadable(path), open(path, "rb") as file:
    for number, line in enumerate(_lines(file, b"\n"), start=1):
      if line is None:
        if next(wanted):
          yield number, BadRow(_too_long())
        continue
      line = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
      if line.strip() and next(wanted):
        yield number, _parsed(line)


def _parsed(line: bytes) -> dict[str, Any] | BadRow:
  try:
    fields = json.loads(line.decode("utf-8"))
  except UnicodeDecodeError as error:
    return BadRow(f"not UTF-8: {error.reason} at byte {error.start + 1}")
  except json.JSONDecodeError as error:
    return BadRow(f"not valid JSON: {error.msg} at column {error.colno}")
  except (ValueError, RecursionError) as error:
    return BadRow(f"not valid JSON: {error}")
  return fields if isinstance(fields, dict) else BadRow(f"not a JSON object but {kind_of(fields)}")


def kind_of(value: Any) -> str:
  """The type of a value, for messages."""
  kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
  return (kinds | {bytes: "bytes", type(None): "null"}).get(type(value), f"a {type(value).__name__}")


@contextlib.contextmanager
def _csv_rows(path: pathlib.Path) -> Iterator[Any]:
  csv.field_size_limit(_MAX_CSV_FIELD)
  with _unreadable(path), open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
    yield csv.reader(map(_csv_line, _lines(file, "\n", "\r")), strict=True)


def _csv_line(line: str | None) -> str:
  if line is None:
    raise _LongLineError(f"a line is {_too_long()}")
  return line


def _csv_columns(path: pathlib.Path) -> list[str]:
  with _csv_rows(path) as rows:
    try:
      names = next(rows, [])
    except csv.Error as error:
      raise UserError(f"{path}: the line of column names is not valid CSV: {error}") from error
  if not names:
    raise UserError(f"the prompt file {path}: its first line is empty; it must name the columns")
  repeated = [name for name, count in collections.Counter(names).items() if name and count > 1]
  if repeated:
    raise UserError(f"{path}: several columns have the name {repeated[0]!r}")
  return names


def _read_csv(path: pathlib.Path, columns: Collection[str] | None, wanted: Iterator[bool]) -> Iterator[Any]:
  """An empty field is none."""
  del columns
  with _csv_rows(path) as rows:
    names, num_long = next(rows, []), 0
    while True:
      number = rows.line_num + num_long + 1
      try:
        values = next(rows)
      except StopIteration:
        return
      except csv.Error as error:
        values, bad = None, BadRow(f"not valid CSV: {error}")
        num_long += isinstance(error, _LongLineError)
      if values != [] and next(wanted):
        yield number, bad if values is None else _named(names, values)


def _named(names: Sequence[str], values: Sequence[str]) -> dict[str, str | None] | BadRow:
  if len(values) != len(names):
    return BadRow(f"not valid CSV: {len(values)} fields, but the first line names {len(names)}")
  if any("\udc80" <= character <= "\udcff" for value in values for character in value):
    return BadRow("not UTF-8")
  return {name: value or None for name, value in zip(names, values, strict=True)}


@contextlib.contextmanager
def _parquet(path: pathlib.Path) -> Iterator[Any]:
  with _needs_extra(path):
    from pyarrow import parquet  # slow to import

  with _unreadable(path), parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
    yield file


def _parquet_columns(path: pathlib.Path) -> list[str]:
  with _parquet(path) as file:
    return file.schema_arrow.names


def _read_parquet(path: pathlib.Path, columns: Collection[str] | None, wanted: Iterator[bool]) -> Iterator[Any]:
  with _parquet(path) as file:
    number = 1
    for group in range(file.num_row_groups):
      flags = list(itertools.islice(wanted, file.metadata.row_group(group).num_rows))
      if any(flags):  # or nothing of it is read
        yield from _rows(file.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns), flags, number)
      number += len(flags)


@contextlib.contextmanager
def _arrow(path: pathlib.Path) -> Iterator[Any]:
  with _needs_extra(path):
    import pyarrow  # slow to import

  with _unreadable(path), pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_stream(source) as stream:
    yield stream


def _arrow_columns(path: pathlib.Path) -> list[str]:
  with _arrow(path) as stream:
    return stream.schema.names


def _read_arrow(path: pathlib.Path, columns: Collection[str] | None, wanted: Iterator[bool]) -> Iterator[Any]:
  with _arrow(path) as stream:
    number = 1
    for batch in stream:
      flags = list(itertools.islice(wanted, batch.num_rows))
      own = batch if columns is None else batch.select(list(columns))
      yield from _rows((own.slice(n, BATCH_ROWS) for n in range(0, len(flags), BATCH_ROWS)), flags, number)
      number += len(flags)


def _rows(batches: Iterable[Any], flags: Sequence[bool], number: int) -> Iterator[tuple[int, dict[str, Any]]]:
  """The wanted rows of consecutive batches, the first of which has a number."""
  start = 0
  for batch in batches:
    own = flags[start : start + batch.num_rows]
    if any(own):
      yield from itertools.compress(enumerate(_fields(batch), number + start), own)
    start += batch.num_rows


def _fields(batch: Any) -> list[dict[str, Any]]:
  try:
    return batch.to_pylist()
  except (ValueError, OverflowError):  # of a single value, which is found one by one
    columns = [[_value(scalar) for scalar in column] for column in batch.columns]
    return [dict(zip(batch.schema.names, values, strict=True)) for values in zip(*columns, strict=True)]


def _value(scalar: Any) -> Any:
  try:
    return scalar.as_py()
  except UnicodeDecodeError as error:
    return BadRow(f"not UTF-8: {error.reason} at byte {error.start + 1}")
  except (ValueError, OverflowError) as error:
    return BadRow(f"not readable: {first_line(error)}")


@contextlib.contextmanager
def _unreadable(path: pathlib.Path) -> Iterator[None]:
  """Turns errors of the file system and of pyarrow, which are of these types, into a UserError."""
  try:
    yield
  except UserError:
    raise
  except (OSError, ValueError, NotImplementedError) as error:
    reason = getattr(error, "strerror", None) or first_line(error)
    raise UserError(f"cannot read the prompt file {path}: {reason}") from error


@contextlib.contextmanager
def _needs_extra(path: pathlib.Path) -> Iterator[None]:
  try:
    yield
  except ImportError as error:
    raise UserError(f"{path}: this needs the extra `data`: {EXTRA}") from error
