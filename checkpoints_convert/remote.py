"""Converted checkpoints in object storage, as `gs://bucket/name`: written in place.

Object storage has no renaming of directories and no locks: a file says that a conversion is under way, and the marker comes last.
"""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from etils import epath

from checkpoints_convert.errors import CheckpointError
from checkpoints_convert.marker import MARKER, PARAMS
from checkpoints_convert.source import AnyPath, first_line

UNFINISHED = "himap_jax.unfinished"


def is_remote(name: str | os.PathLike[str]) -> bool:
  """Whether a path is a URL of object storage."""
  return "://" in os.fspath(name)


def reach(name: str | os.PathLike[str]) -> epath.Path:
  """The directory of a URL, which can be asked whether it exists.

  Raises:
    CheckpointError: the storage cannot be reached.
  """
  try:
    path = epath.Path(name)
    path.exists()
    return path
  except Exception as error:  # every storage's client raises its own
    raise CheckpointError(
      f"{os.fspath(name)}: cannot be reached ({first_line(error)}); gs:// needs gcsfs (pip install -e '.[tpu]') and "
      "credentials (gcloud auth application-default login)"
    ) from error


@contextlib.contextmanager
def new_directory(target: epath.Path) -> Iterator[tuple[pathlib.Path, Any]]:
  """A folder here whose files are copied to `target` when the block ends, its marker last, and where parameters go.

  What an earlier process left there unfinished is removed first.
  """
  if is_unfinished(target):
    target.rmtree()
  target.mkdir(parents=True, exist_ok=True)
  (target / UNFINISHED).write_text("")
  with tempfile.TemporaryDirectory() as name:
    files = pathlib.Path(name)
    yield files, target / PARAMS
    for path in sorted(files.iterdir(), key=lambda path: path.name == MARKER):
      (target / path.name).write_bytes(path.read_bytes())
  (target / UNFINISHED).unlink()


def is_unfinished(target: AnyPath) -> bool:
  """Whether a conversion into it did not end."""
  return (target / UNFINISHED).exists()
