"""Parquet outputs: JSON lines while a run writes, which become the table at its end."""

import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from checkpoints_convert.messages import first_line
from himap_jax.errors import UserError
from himap_jax.run.records import BATCH_ROWS, EXTRA
from himap_jax.run.user_errors import user_error
from himap_jax.run.writer import COUNTS, REQUIRED, OutputWriter, Row

SUFFIX = ".parquet"
# What is in memory at a time when a table is written: so many rows, or so many bytes of their JSON and one more row.
GROUP_ROWS = 1000
GROUP_BYTES = 1 << 26


class TableWriter(OutputWriter):
  """As `OutputWriter`, for a parquet file.

  Rows are appended to `<path>.jsonl`, which begins with those of the table. When the context ends without an exception,
  it becomes the table; else it stays, and is what the next run resumes from.
  """

  def __init__(self, path: pathlib.Path, *, resume: bool, is_stale: Callable[[Row], bool] = lambda row: False):
    """As `OutputWriter`; raises `UserError` also if pyarrow is missing."""
    try:
      import pyarrow.parquet  # noqa: F401
    except ImportError as error:
      raise UserError(f"--output={path}: parquet needs the extra `data`: {EXTRA}") from error
    with user_error(f"cannot write the output {path}"):
      if path.exists() and not path.is_file():
        raise UserError(f"cannot write the output {path}: not a regular file")
      before = functools.partial(read_table, path) if path.exists() else None
    self._table, self._lines = path, path.with_name(f"{path.name}.jsonl")
    super().__init__(self._lines, resume=resume, is_stale=is_stale, before=before)

  def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
    try:
      if kind is None and self.has_more:
        with user_error(f"cannot write the output {self._table}"):
          write_table(self._table, self._lines)
          os.unlink(self._lines)
    finally:
      self.close()


def write_table(path: pathlib.Path, lines: pathlib.Path) -> None:
  """Writes a parquet file of a file of JSON lines, whole or not at all; its ids are integers if all are.

  A link stays, and what it leads to is written.

  Raises:
    OSError: the file cannot be written.
  """
  import pyarrow as pa
  from pyarrow import parquet

  schema, path = _schema(lines), path.resolve()
  unfinished = path.with_name(f"{path.name}.partial")
  try:
    with open(unfinished, "wb") as file:
      with parquet.ParquetWriter(file, schema) as writer:
        for group in _groups(lines):
          if schema.field("id").type == pa.string():
            group = [row | {"id": str(row["id"])} for row in group]
          writer.write_table(pa.Table.from_pylist(group, schema))
      os.fsync(file.fileno())
    os.replace(unfinished, path)
  except BaseException:
    unfinished.unlink(missing_ok=True)
    raise


def read_table(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  """The rows that `write_table` wrote; raises `UserError` if the file holds anything else."""
  import pyarrow as pa
  from pyarrow import parquet

  try:
    with parquet.ParquetFile(path, pre_buffer=False) as file:
      if not set(REQUIRED) <= set(file.schema_arrow.names):
        raise UserError(f"{path} is not an output: it has no columns {', '.join(REQUIRED)}")
      for batch in file.iter_batches(BATCH_ROWS):
        for row in batch.to_pylist():
          yield {name: value for name, value in row.items() if value is not None or name in REQUIRED}
  except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
    raise UserError(f"cannot read the output {path}: {first_line(error)}") from error


def _lines(path: pathlib.Path) -> Iterator[bytes]:
  with open(path, "rb") as file:
    yield from (line for line in file if line.strip())


def _groups(lines: pathlib.Path) -> Iterator[list[dict[str, Any]]]:
  """The rows in groups; rows with logits are large."""
  group, num_bytes = [], 0
  for line in _lines(lines):
    group.append(json.loads(line))
    num_bytes += len(line)
    if len(group) == GROUP_ROWS or num_bytes >= GROUP_BYTES:
      yield group
      group, num_bytes = [], 0
  if group:
    yield group


def _schema(lines: pathlib.Path) -> Any:
  """The columns of the rows, with those of `--emit` that any of them has."""
  import pyarrow as pa

  names, ids_are_integers = set(), True
  for row in map(json.loads, _lines(lines)):
    names.update(row)
    ids_are_integers &= type(row["id"]) is int and -(1 << 63) <= row["id"] < 1 << 63
  seconds = {"prefill_seconds": pa.float64(), "decode_seconds": pa.float64()}
  counts = {name: pa.list_(pa.int32()) if name == "kept" else pa.int32() for name in COUNTS}
  types = {
    "id": pa.int64() if ids_are_integers else pa.string(),
    "answer": pa.string(),
    "error": pa.string(),
    "digest": pa.string(),
    "token_ids": pa.list_(pa.int32()),
    "kept": pa.list_(pa.list_(pa.int32())),
    "kept_patches": pa.list_(pa.list_(pa.list_(pa.int32()))),
    "counts": pa.struct(list(counts.items())),
    "first_logits": pa.list_(pa.float32()),
    "timing": pa.struct(list(seconds.items())),
  }
  return pa.schema([(name, own) for name, own in types.items() if name in names])
