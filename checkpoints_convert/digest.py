"""A digest of a checkpoint's content, independent of its location."""

import contextlib
import hashlib
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

from checkpoints_convert.errors import CheckpointError
from checkpoints_convert.json_files import read_json, write_json
from checkpoints_convert.marker import ASSEMBLED, MARKER
from checkpoints_convert.progress import byte_bar
from checkpoints_convert.source import SMALL_FILES

_BLOCK_BYTES = 8 << 20
_found: dict[pathlib.Path, dict[str, Any]] = {}  # by this process, by the file of a cache, which may not be writable


def content_digest(directory: pathlib.Path, weights: Iterable[pathlib.Path], cache_dir: pathlib.Path) -> str:
  """SHA-256, in hexadecimal, of the names and contents of all files of a checkpoint that can affect its answers.

  These are the files `weights`, in the directory, configuration, tokenizer, image processor, chat template and
  generation settings, without those that say how the checkpoint was made. File digests are cached in `cache_dir` until
  a file's size, modification time or inode changes; where it cannot be written, in this process. Raises
  `CheckpointError` if a file cannot be read.
  """
  directory = directory.resolve()
  small = {path for pattern in SMALL_FILES for path in directory.glob(pattern)}
  small -= {directory / MARKER, directory / ASSEMBLED}
  return _digest(directory, sorted({*small, *(directory / path.name for path in weights)}), cache_dir)


def tree_digest(directory: pathlib.Path, cache_dir: pathlib.Path) -> str:
  """As `content_digest`, of all files in a directory and in those inside it."""
  directory = directory.resolve()
  return _digest(directory, sorted(path for path in directory.rglob("*") if path.is_file()), cache_dir)


def _digest(directory: pathlib.Path, paths: list[pathlib.Path], cache_dir: pathlib.Path) -> str:
  kept_in = cache_dir / "digests" / f"{hashlib.sha256(str(directory).encode()).hexdigest()[:16]}.json"
  known = _found.get(kept_in, {})
  with contextlib.suppress(ValueError):
    known = {name: entry for name, entry in read_json(kept_in).items() if isinstance(entry, list)}
  name_of = {path: path.relative_to(directory).as_posix() for path in paths}
  try:
    found = {name_of[path]: _state(path) for path in paths}
    unread = [path for path in paths if known.get(name_of[path], [])[:-1] != found[name_of[path]]]
    with byte_bar(sum(path.stat().st_size for path in unread), "identifying the checkpoint") as bar:
      for path in paths:
        digest = _sha256(path, bar.update) if path in unread else known[name_of[path]][-1]
        found[name_of[path]].append(digest)
  except OSError as error:
    raise CheckpointError(f"{error.filename}: {error.strerror}") from error
  _found[kept_in] = found
  if unread:
    with contextlib.suppress(OSError):
      kept_in.parent.mkdir(parents=True, exist_ok=True)
      write_json(kept_in, found)
  lines = "".join(f"{name} {entry[-1]}\n" for name, entry in sorted(found.items()))
  return hashlib.sha256(lines.encode()).hexdigest()


def _state(path: pathlib.Path) -> list[int | str]:
  stat = path.stat()
  return [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _sha256(path: pathlib.Path, advance: Callable[[int], Any]) -> str:
  digest = hashlib.sha256()
  with open(path, "rb", buffering=0) as file:
    while block := file.read(_BLOCK_BYTES):
      digest.update(block)
      advance(len(block))
  return digest.hexdigest()
