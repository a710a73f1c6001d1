"""Converted checkpoints in object storage, as `gs://bucket/name`: written in place, and their small files copied from there.

Object storage has no renaming of directories and no locks: a file says that a conversion is under way, and the marker comes last.
"""

import contextlib
import hashlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from etils import epath

from checkpoints_convert.marker import MARKER, PARAMS, read_marker
from checkpoints_convert.source import first_line

UNFINISHED = "himap_jax.unfinished"


def is_remote(name: str | os.PathLike[str]) -> bool:
  """Whether a path is a URL of object storage."""
  return "://" in os.fspath(name)


def reach(name: str | os.PathLike[str]) -> epath.Path:
  """The directory of a URL, which can be asked whether it exists.

  Raises:
    ValueError: the storage cannot be reached.
  """
  try:
    path = epath.Path(name)
    path.exists()
    return path
  except Exception as error:  # every storage's client raises its own
    raise ValueError(
      f"{os.fspath(name)}: cannot be reached ({first_line(error)}); gs:// needs gcsfs (pip install -e '.[tpu]') and "
      "credentials (gcloud auth application-default login)"
    ) from error


@contextlib.contextmanager
def new_directory(target: epath.Path) -> Iterator[tuple[pathlib.Path, Any]]:
  """A folder here whose files are copied to `target` when the block ends, its marker last, and where parameters go.

  What an earlier process left there unfinished is removed first.
  """
  if (target / UNFINISHED).exists():
    target.rmtree()
  target.mkdir(parents=True, exist_ok=True)
  (target / UNFINISHED).write_text("")
  with tempfile.TemporaryDirectory() as name:
    files = pathlib.Path(name)
    yield files, target / PARAMS
    for path in sorted(files.iterdir(), key=lambda path: path.name == MARKER):
      (target / path.name).write_bytes(path.read_bytes())
  (target / UNFINISHED).unlink()


def is_unfinished(target: epath.Path) -> bool:
  """Whether a conversion into it did not end."""
  return (target / UNFINISHED).exists()


def copy_files(directory: epath.Path, cache_dir: pathlib.Path) -> pathlib.Path:
  """A finished conversion's files, without its parameters, copied into the cache once.

  Raises:
    ValueError: there is no finished conversion.
  """
  marker = read_marker(directory)
  if marker is None or is_unfinished(directory):
    raise ValueError(
      f"{directory}: no converted checkpoint; write one with python -m checkpoints_convert.llava --target={directory}"
    )
  digest = hashlib.sha256(f"{directory} {marker['fingerprint']}".encode()).hexdigest()[:16]
  copy = cache_dir / "remote" / f"{directory.name}-{digest}"
  if not copy.exists():
    copy.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=copy.parent) as name:
      files = pathlib.Path(name) / copy.name
      files.mkdir()
      for path in directory.iterdir():
        if path.name != PARAMS:
          (files / path.name).write_bytes(path.read_bytes())
      with contextlib.suppress(FileExistsError):
        shutil.move(files, copy)
  return copy
