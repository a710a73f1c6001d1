"""The output file: JSON lines appended batch by batch, resumable after a kill."""

import contextlib
import fcntl
import json
import os
import stat
from collections.abc import Collection, Iterable, Mapping
from typing import Any, BinaryIO, NamedTuple, Self

from checkpoints_convert.store import is_still

_REQUIRED = frozenset({"id", "answer", "error"})


class OutputWriter:
  """Appends rows to a JSONL file; the only writer of that file while it is open.

  A context manager. A batch is one write followed by an fsync, so a process
  killed at any moment leaves at most one torn row, at the end, which the next
  run with `resume` removes.

  Attributes:
    answered: the ids in the file: those found by `resume` and those written.
  """

  answered: set[str | int]

  def __init__(self, path: str | os.PathLike[str], *, resume: bool, retry: Collection[str | int] = ()):
    """Opens and locks the file, and creates it where there is none.

    Args:
      path: the output file; its directory must exist.
      resume: keep the rows that the file has. Otherwise they are replaced
        when the first batch is written, so a run that fails before that
        loses nothing.
      retry: ids that are to be answered again where `resume` finds their rows
        with an error; these rows are taken out when the first batch is
        written.

    Raises:
      ValueError: the path cannot be written, another run is writing it, or
        `resume` finds something other than output rows in it.
    """
    self._path = path
    self._file = _open_locked(path)
    self._replace = not resume
    self._retried: set[str | int] = set()
    self.answered = set()
    if resume:
      with contextlib.ExitStack() as stack:
        stack.callback(self.close)
        scan = _repair(self._file, path)
        self._retried = scan.failed.intersection(retry)
        self.answered = scan.ids - self._retried
        stack.pop_all()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()

  def close(self) -> None:
    """Closes the file and releases its lock; a second call does nothing."""
    self._file.close()

  def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
    """Appends a batch, whole or not at all.

    Raises:
      ValueError: a row lacks `id`, `answer` or `error`, repeats an id, or
        holds NaN or infinity, or rows to be tried again cannot be taken out;
        nothing is written.
      TypeError: a row holds a value that JSON does not have.
      OSError: the write failed, for example on a full disk; the part that
        was written is taken back.
    """
    rows = list(rows)
    ids = self._new_ids(rows)
    data = b"".join(json.dumps(dict(row), allow_nan=False).encode() + b"\n" for row in rows)
    if self._replace:
      self._file.truncate(0)
      self._replace = False
    if self._retried:
      self._file = _without(self._file, self._path, self._retried)
      self._retried = set()
    start = self._file.seek(0, os.SEEK_END)
    try:
      _write_all(self._file, data)
      os.fsync(self._file.fileno())
    except BaseException:
      with contextlib.suppress(OSError):
        self._file.truncate(start)
      raise
    self.answered |= ids

  def _new_ids(self, rows: Iterable[Mapping[str, Any]]) -> set[str | int]:
    ids: set[str | int] = set()
    for row in rows:
      if not _REQUIRED <= row.keys():
        raise ValueError(f"an output row needs {sorted(_REQUIRED)}")
      if row["id"] in ids or row["id"] in self.answered:
        raise ValueError(f"the id {row['id']!r} already has an output row")
      ids.add(row["id"])
    return ids


def answered_ids(path: str | os.PathLike[str], *, retry: Collection[str | int] = ()) -> set[str | int]:
  """The ids with a row in an output file, rows with an error among them but for ids that are to be tried again.

  A torn last row does not count, and a missing file has no rows. The file is
  left as it is.

  Raises:
    ValueError: the file cannot be read, or has a line that is not an output row.
  """
  try:
    scan = _scan(path)
    return scan.ids - scan.failed.intersection(retry)
  except FileNotFoundError:
    return set()
  except OSError as error:
    raise _cannot("read", path, error) from error


class _Scan(NamedTuple):
  ids: set[str | int]
  failed: set[str | int]
  end: int
  lacks_newline: bool


def _scan(path: str | os.PathLike[str]) -> _Scan:
  ids: set[str | int] = set()
  failed: set[str | int] = set()
  end = 0
  with open(path, "rb") as file:
    for number, line in enumerate(file, start=1):
      whole = line.endswith(b"\n")
      if line.strip():
        row = _parse(line)
        if row is None and not whole and line.startswith(b"{"):
          return _Scan(ids, failed, end, False)
        if not _is_output_row(row):
          raise ValueError(f"{path}: line {number} is not an output row")
        ids.add(row["id"])
        if row["error"] is not None:
          failed.add(row["id"])
      end += len(line)
  return _Scan(ids, failed, end, end > 0 and not whole)


def _parse(line: bytes) -> Any:
  try:
    return json.loads(line.decode("utf-8"))
  except (ValueError, RecursionError):
    return None


def _is_output_row(row: Any) -> bool:
  is_row = isinstance(row, dict) and _REQUIRED <= row.keys()
  return is_row and type(row["id"]) in (str, int)


def _repair(file: BinaryIO, path: str | os.PathLike[str]) -> _Scan:
  """Removes a torn last row; a last row that only lacks its newline is completed."""
  scan = _scan(path)
  file.truncate(scan.end)
  if scan.lacks_newline:
    _write_all(file, b"\n")
  return scan


def _without(file: BinaryIO, path: str | os.PathLike[str], ids: Collection[str | int]) -> BinaryIO:
  """Puts a copy without the rows of some ids in the place of a whole file, and returns it, locked."""
  unfinished = f"{os.fspath(path)}.partial"
  with contextlib.ExitStack() as stack:
    copy = stack.enter_context(_open_locked(unfinished))
    try:
      copy.truncate(0)
      with open(path, "rb") as rows:
        for line in rows:
          if line.strip() and _parse(line)["id"] not in ids:
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
  try:
    if os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
      raise ValueError(f"cannot write the output {path}: not a regular file")
    file = open(path, "a+b", buffering=0)
  except OSError as error:
    raise _cannot("write", path, error) from error
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    file.close()
    raise ValueError(f"another run is writing the output {path}") from error
  except OSError:
    pass  # A file system without locks: the run goes on unguarded.
  if not is_still(file, path):
    file.close()
    raise ValueError(f"another run is writing the output {path}")
  return file


def _write_all(file: BinaryIO, data: bytes) -> None:
  view = memoryview(data)
  while view:
    view = view[file.write(view) :]


def _cannot(verb: str, path: str | os.PathLike[str], error: OSError) -> ValueError:
  return ValueError(f"cannot {verb} the output {path}: {error.strerror}")
