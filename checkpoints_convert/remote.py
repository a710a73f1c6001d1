"""Converted checkpoints in object storage, as `gs://bucket/name`, written in place.

Object storage has neither directory renaming nor locks: a file marks an unfinished conversion, and the marker is
written last.
"""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from etils import epath

from checkpoints_convert.errors import CheckpointError
from checkpoints_convert.marker import MARKER
from checkpoints_convert.messages import first_line
from checkpoints_convert.source import PARAMS, AnyPath

UNFINISHED = "himap_jax.unfinished"


def is_remote(name: str | os.PathLike[str]) -> bool:
  """Whether a path is a URL of object storage."""
  return "://" in os.fspath(name)


def reach(name: str | os.PathLike[str]) -> epath.Path:
  """The directory of a URL; raises `CheckpointError` if the storage cannot be reached."""
  try:
    path = epath.Path(name)
    path.exists()
    return path
  except Exception as error:  # every storage client raises its own errors
    raise CheckpointError(
      f"{os.fspath(name)}: cannot be reached ({first_line(error)}); gs:// needs gcsfs (pip install -e '.[tpu]') and "
      "credentials (gcloud auth application-default login)"
    ) from error


@contextlib.contextmanager
def new_directory(target: epath.Path) -> Iterator[tuple[pathlib.Path, Any]]:
  """Yields a local folder, copied to `target` when the block ends (marker last), and the directory for parameters.

  What an earlier, unfinished process left in `target` is removed first.
  """
  if is_unfinished(target):
    target.rmtree()
  target.mkdir(parents=True, exist_ok=True)
  (target / UNFINISHED).write_text("")
  with tempfile.TemporaryDirectory() as name:
    files = pathlib.Path(name)
    yield files, target / PARAMS
    for path in sorted(filter(pathlib.Path.is_file, files.rglob("*")), key=lambda path: path.name == MARKER):
      copy = target / path.relative_to(files).as_posix()
      copy.parent.mkdir(parents=True, exist_ok=True)
      copy.write_bytes(path.read_bytes())
  (target / UNFINISHED).unlink()


def is_unfinished(target: AnyPath) -> bool:
  """Whether a conversion into the target did not finish."""
  return (target / UNFINISHED).exists()
