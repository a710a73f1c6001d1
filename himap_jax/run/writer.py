"""A file of JSON lines, appended batch by batch and resumable after a kill."""

import contextlib
import fcntl
import json
import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, BinaryIO

from himap_jax.errors import UserError
from himap_jax.run.user_errors import user_error

Row = Mapping[str, Any]
REQUIRED = ("id", "answer", "error", "digest")
COUNTS = ("tiles", "image_tokens", "text_tokens", "kept")  # of a row, with --emit=counts


class OutputWriter(contextlib.AbstractContextManager):
  """Appends rows to a JSONL file, locked while it is open; a context manager.

  A batch is one write followed by an fsync, so a process killed at any moment leaves at most one torn row at the end,
  which the next run with `resume` removes. A new file that received no row is removed.

  Attributes:
    answered: ids in the file as text, both those found by `resume` and those written.
  """

  def __init__(
    self,
    path: str | os.PathLike[str],
    *,
    resume: bool,
    is_stale: Callable[[Row], bool] = lambda row: False,
    before: Callable[[], Iterable[Row]] | None = None,
  ):
    """Opens and locks the file, creating it if necessary.

    Args:
      path: its directory must exist.
      resume: keep existing rows. Otherwise they are replaced when the first batch is written, so a run that fails
        before that loses nothing.
      is_stale: whether an existing row must be replaced; such rows are removed when the first batch is written. It may
        raise UserError for a row that must not stay.
      before: with `resume` the rows that an empty file begins with. If none follow, the file is removed again.

    Raises:
      UserError: the path is not writable, another run is writing it, or `resume` finds anything but output rows.
    """
    self._path = path
    self._is_new = not os.path.exists(path)
    self._file = _open_locked(path)
    self._replaces = not resume
    self._is_copy = False
    self._stale: set[str] = set()
    self.answered: set[str] = set()
    if resume:
      with contextlib.ExitStack() as stack, user_error(f"cannot read the output {path}"):
        stack.callback(self.close)
        if before is not None and not os.fstat(self._file.fileno()).st_size:
          self._file = _replace(self._file, self._path, (_line(row) for row in before()))
          self._is_copy = True
        self._read(is_stale)
        stack.pop_all()

  def __exit__(self, *exception: object) -> None:
    self.close()

  def close(self) -> None:
    """Closes the file and releases its lock; idempotent."""
    if not self._file.closed and (self._is_copy or (self._is_new and not os.fstat(self._file.fileno()).st_size)):
      with contextlib.suppress(OSError):
        os.unlink(self._path)
    self._file.close()

  @property
  def has_more(self) -> bool:
    """Whether it has rows besides those that it began with."""
    return not self._is_copy and os.fstat(self._file.fileno()).st_size > 0

  def forget(self, keys: Collection[str]) -> None:
    """Makes rows stale, which are removed when the first batch is written."""
    self._stale.update(keys)
    self.answered.difference_update(keys)

  def write(self, rows: Iterable[Row]) -> None:
    """Appends a batch, completely or not at all.

    Raises:
      UserError: the write failed, for example on a full disk; a partial write is undone.
      ValueError: a row lacks a field, repeats an id, or holds NaN or infinity; nothing is written.
      TypeError: a row holds a value that JSON does not support; nothing is written.
    """
    rows = list(rows)
    keys = self._new_keys(rows)
    data = b"".join(map(_line, rows))
    with user_error(f"cannot write the output {self._path}"):
      if self._replaces:
        self._file.truncate(0)
        self._replaces = False
      if self._stale:
        self._file = _replace(self._file, self._path, self._lines_without(self._stale))
        self._stale = set()
      start = self._file.seek(0, os.SEEK_END)
      try:
        _write_all(self._file, data)
        os.fsync(self._file.fileno())
      except BaseException:
        with contextlib.suppress(OSError):
          self._file.truncate(start)
        raise
    self._is_copy = False
    self.answered |= keys

  def _new_keys(self, rows: Iterable[Row]) -> set[str]:
    keys: set[str] = set()
    for row in rows:
      if not row.keys() >= set(REQUIRED):
        raise ValueError(f"an output row needs {', '.join(REQUIRED)}")
      key = str(row["id"])
      if key in keys or key in self.answered:
        raise ValueError(f"the id {row['id']!r} already has an output row")
      keys.add(key)
    return keys

  def _lines_without(self, keys: Collection[str]) -> Iterator[bytes]:
    with open(self._path, "rb") as lines:
      yield from (line for line in lines if line.strip() and str(_parse(line)["id"]) not in keys)

  def _read(self, is_stale: Callable[[Row], bool]) -> None:
    """Reads existing rows; removes a torn last row, and completes one that only lacks its newline."""
    end, line = 0, b"\n"
    with open(self._path, "rb") as file:
      for number, line in enumerate(file, start=1):
        if line.strip():
          if is_torn(line):
            self._file.truncate(end)
            break
          row = _parse(line)
          if not _is_output_row(row):
            raise UserError(f"{self._path}: line {number} is not an output row ({', '.join(REQUIRED)})")
          key = str(row["id"])
          if key in self.answered or key in self._stale:
            raise UserError(f"{self._path}: line {number} repeats the id {row['id']!r}; remove all but one of its rows")
          (self._stale if is_stale(row) else self.answered).add(key)
        end += len(line)
      else:
        if not line.endswith(b"\n"):
          _write_all(self._file, b"\n")
    self.answered -= self._stale


def is_torn(line: bytes) -> bool:
  """Whether a line is the beginning of a row, which a writer that was killed left at the end."""
  return line.startswith(b"{") and not line.endswith(b"\n") and _parse(line) is None


def _line(row: Row) -> bytes:
  return json.dumps(dict(row), allow_nan=False).encode() + b"\n"


def _parse(line: bytes) -> Any:
  try:
    return json.loads(line.decode("utf-8"))
  except (ValueError, RecursionError):
    return None


def _is_output_row(row: Any) -> bool:
  is_row = isinstance(row, dict) and row.keys() >= set(REQUIRED)
  return is_row and type(row["id"]) in (str, int) and type(row["digest"]) is str


def _replace(file: BinaryIO, path: str | os.PathLike[str], lines: Iterable[bytes]) -> BinaryIO:
  """Replaces a locked file by one of these lines, whole or not at all; returns the new one, locked.

  A link stays, and what it leads to is replaced.
  """
  path = os.path.realpath(path)
  unfinished = f"{os.fspath(path)}.partial"
  with contextlib.ExitStack() as stack:
    copy = stack.enter_context(_open_locked(unfinished))
    try:
      copy.truncate(0)
      for line in lines:
        _write_all(copy, line)
      os.fsync(copy.fileno())
      os.replace(unfinished, path)
    except BaseException:
      os.unlink(unfinished)
      raise
    stack.pop_all()
  file.close()
  return copy


def _open_locked(path: str | os.PathLike[str]) -> BinaryIO:
  if "\0" in os.fspath(path):
    raise UserError(f"cannot write the output {path!r}: a path cannot contain a null character")
  with user_error(f"cannot write the output {path}"):
    if os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
      raise UserError(f"cannot write the output {path}: not a regular file")
    file = open(path, "a+b", buffering=0)
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    # The previous writer may have removed or replaced the file.
    is_locked = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
  except (BlockingIOError, FileNotFoundError):
    is_locked = False
  except OSError:
    is_locked = True  # A file system without locks: continue without one.
  if not is_locked:
    file.close()
    raise UserError(f"another run is writing the output {path}")
  return file


def _write_all(file: BinaryIO, data: bytes) -> None:
  view = memoryview(data)
  while view:
    view = view[file.write(view) :]
