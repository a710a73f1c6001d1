"""The output file: JSON lines appended batch by batch, resumable after a kill."""

import contextlib
import fcntl
import json
import os
import stat
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, BinaryIO

from himap_jax.engine import processes
from himap_jax.errors import UserError
from himap_jax.run.command import user_error
from himap_jax.run.contract import Contract

Row = Mapping[str, Any]
_REQUIRED = ("id", "answer", "error", "digest")


class Output(contextlib.AbstractContextManager):
  """The output of a run: a context manager in every process; the first process writes.

  Attributes:
    answered: ids of answered prompts as text; the same in every process.
  """

  def __init__(self, contract: Contract, *, resume: bool):
    """Opens the file and finds the answered prompts; see `OutputWriter`.

    Raises:
      UserError: in all processes, if the first cannot use the file or its rows were made with other settings.
    """
    self.contract = contract
    self._writer, refusal, has_row = None, None, [0] * len(contract.prompts)
    with contextlib.ExitStack() as stack:
      if processes.is_leader():
        try:
          writer = OutputWriter(contract.output, resume=resume, is_stale=contract.is_stale)
          self._writer = stack.enter_context(writer)
          has_row = [int(prompt.key in writer.answered) for prompt in contract.prompts]
          if contract.unreadable:
            print(
              f"{contract.unreadable} pictures of answered rows cannot be read; their answers are kept", file=sys.stderr
            )
        except UserError as error:
          refusal = error
      is_refused, *has_row = processes.sum_over_processes([int(refusal is not None), *has_row]).tolist()
      if is_refused:
        raise refusal or UserError("the first process of this run cannot start; its own message says why")
      self._open = stack.pop_all()
    self.answered = frozenset(prompt.key for prompt, has in zip(contract.prompts, has_row, strict=True) if has)
    self._has_settings = False

  def __exit__(self, *exception: object) -> None:
    self._open.close()

  def write(self, rows: Collection[Row]) -> None:
    """Writes a batch of rows, the same in every process, and first the settings; errors as in `OutputWriter.write`."""
    if self._writer is not None and rows:
      if not self._has_settings:
        self.contract.write_settings()
        self._has_settings = True
      self._writer.write(rows)


class OutputWriter(contextlib.AbstractContextManager):
  """Appends rows to a JSONL file, locked while it is open; a context manager.

  A batch is one write followed by an fsync, so a process killed at any moment leaves at most one torn row at the end,
  which the next run with `resume` removes. A new file that received no row is removed.

  Attributes:
    answered: ids in the file as text, both those found by `resume` and those written.
  """

  def __init__(
    self, path: str | os.PathLike[str], *, resume: bool, is_stale: Callable[[Row], bool] = lambda row: False
  ):
    """Opens and locks the file, creating it if necessary.

    Args:
      path: its directory must exist.
      resume: keep existing rows. Otherwise they are replaced when the first batch is written, so a run that fails
        before that loses nothing.
      is_stale: whether an existing row must be replaced; such rows are removed when the first batch is written. It may
        raise UserError for a row that must not stay.

    Raises:
      UserError: the path is not writable, another run is writing it, or `resume` finds anything but output rows.
    """
    self._path = path
    self._is_new = not os.path.exists(path)
    self._file = _open_locked(path)
    self._replaces = not resume
    self._stale: set[str] = set()
    self.answered: set[str] = set()
    if resume:
      with contextlib.ExitStack() as stack, user_error(f"cannot read the output {path}"):
        stack.callback(self.close)
        self._read(is_stale)
        stack.pop_all()

  def __exit__(self, *exception: object) -> None:
    self.close()

  def close(self) -> None:
    """Closes the file and releases its lock; idempotent."""
    if self._is_new and not self._file.closed and not os.fstat(self._file.fileno()).st_size:
      with contextlib.suppress(OSError):
        os.unlink(self._path)
    self._file.close()

  def write(self, rows: Iterable[Row]) -> None:
    """Appends a batch, completely or not at all.

    Raises:
      UserError: the write failed, for example on a full disk; a partial write is undone.
      ValueError: a row lacks a field, repeats an id, or holds NaN or infinity; nothing is written.
      TypeError: a row holds a value that JSON does not support; nothing is written.
    """
    rows = list(rows)
    keys = self._new_keys(rows)
    data = b"".join(json.dumps(dict(row), allow_nan=False).encode() + b"\n" for row in rows)
    with user_error(f"cannot write the output {self._path}"):
      if self._replaces:
        self._file.truncate(0)
        self._replaces = False
      if self._stale:
        self._file = _replace_without(self._file, self._path, self._stale)
        self._stale = set()
      start = self._file.seek(0, os.SEEK_END)
      try:
        _write_all(self._file, data)
        os.fsync(self._file.fileno())
      except BaseException:
        with contextlib.suppress(OSError):
          self._file.truncate(start)
        raise
    self.answered |= keys

  def _new_keys(self, rows: Iterable[Row]) -> set[str]:
    keys: set[str] = set()
    for row in rows:
      if not row.keys() >= set(_REQUIRED):
        raise ValueError(f"an output row needs {', '.join(_REQUIRED)}")
      key = str(row["id"])
      if key in keys or key in self.answered:
        raise ValueError(f"the id {row['id']!r} already has an output row")
      keys.add(key)
    return keys

  def _read(self, is_stale: Callable[[Row], bool]) -> None:
    """Reads existing rows; removes a torn last row, and completes one that only lacks its newline."""
    end, line = 0, b"\n"
    with open(self._path, "rb") as file:
      for number, line in enumerate(file, start=1):
        if line.strip():
          row = _parse(line)
          if row is None and line.startswith(b"{") and not line.endswith(b"\n"):
            self._file.truncate(end)
            break
          if not _is_output_row(row):
            raise UserError(f"{self._path}: line {number} is not an output row ({', '.join(_REQUIRED)})")
          (self._stale if is_stale(row) else self.answered).add(str(row["id"]))
        end += len(line)
      else:
        if not line.endswith(b"\n"):
          _write_all(self._file, b"\n")
    self.answered -= self._stale


def _parse(line: bytes) -> Any:
  try:
    return json.loads(line.decode("utf-8"))
  except (ValueError, RecursionError):
    return None


def _is_output_row(row: Any) -> bool:
  is_row = isinstance(row, dict) and row.keys() >= set(_REQUIRED)
  return is_row and type(row["id"]) in (str, int) and type(row["digest"]) is str


def _replace_without(file: BinaryIO, path: str | os.PathLike[str], keys: Collection[str]) -> BinaryIO:
  """Replaces a file by a copy without some rows; returns the copy, locked."""
  unfinished = f"{os.fspath(path)}.partial"
  with contextlib.ExitStack() as stack:
    copy = stack.enter_context(_open_locked(unfinished))
    try:
      copy.truncate(0)
      with open(path, "rb") as rows:
        for line in rows:
          if line.strip() and str(_parse(line)["id"]) not in keys:
            _write_all(copy, line)
      os.fsync(copy.fileno())
      os.replace(unfinished, path)
    except OSError:
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
