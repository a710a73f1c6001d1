"""Writes directories atomically, and parameters in bounded memory."""

import contextlib
import hashlib
import os
import pathlib
import shutil
import sys
from collections.abc import Iterable, Iterator

import filelock
import numpy as np
from etils import epath
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from checkpoints_convert import remote
from checkpoints_convert.errors import CheckpointError
from checkpoints_convert.marker import read_marker
from checkpoints_convert.names import Path
from checkpoints_convert.source import PARAMS, AnyPath

BATCH_BYTES = 128 << 20
CHUNK_BYTES = 64 << 20
FORBIDDEN = "*?["


def save_params(directory: AnyPath, tensors: Iterable[tuple[Path, np.ndarray]]) -> None:
  """Writes parameters as one Orbax checkpoint, with at most `BATCH_BYTES` and one tensor in memory.

  `directory` is created; `tensors`, pairs of a path in the parameter tree and an array, is consumed lazily.
  """
  context = ocp.Context()
  context.array_options.saving.use_compression = False
  context.array_options.saving.storage_options.chunk_byte_size = CHUNK_BYTES
  context.memory_options.deepcopy_host_arrays = False
  batch: dict[Path, np.ndarray] = {}
  num_bytes = 0
  with context:
    for path, array in tensors:
      if batch and num_bytes + array.nbytes > BATCH_BYTES:
        ocp.partial.save(directory, traverse_util.unflatten_dict(batch))
        batch, num_bytes = {}, 0
      batch[path] = array
      num_bytes += array.nbytes
      del array
    if batch:
      ocp.partial.save(directory, traverse_util.unflatten_dict(batch))
    ocp.partial.finalize(directory)


@contextlib.contextmanager
def new_directory(target: AnyPath) -> Iterator[tuple[pathlib.Path, AnyPath]]:
  """Yields a directory for files and one for parameters, renamed to `target` on success and removed on failure.

  The caller holds the lock of `target`. What a killed process left there is removed first. For object storage see
  `remote.new_directory`. Raises `CheckpointError` if a file cannot be written.
  """
  if remote.is_remote(target):
    with remote.new_directory(target) as places:
      yield places
    return
  work = target.with_name(f".{target.name}.partial")
  shutil.rmtree(work, ignore_errors=True)
  with _writing(target):
    work.mkdir(parents=True)
    try:
      yield work, work / PARAMS
      os.rename(work, target)
    except BaseException:
      shutil.rmtree(work, ignore_errors=True)
      raise


@contextlib.contextmanager
def locked(target: AnyPath) -> Iterator[None]:
  """Locks `target`, but not in object storage; a process that waits prints so, and a killed process frees its lock.

  Raises `CheckpointError` if the directory of `target` cannot be written.
  """
  if remote.is_remote(target):
    yield
    return
  path = target.with_name(f".{target.name}.lock")
  with _writing(target):
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path)
    try:
      lock.acquire(timeout=0)
    except filelock.Timeout:
      print(f"waiting for the process that is writing {target}", file=sys.stderr)
      lock.acquire()
  try:
    yield
  finally:
    path.unlink(missing_ok=True)  # while the lock is held, so that a waiting process notices and opens a new one
    lock.release()


@contextlib.contextmanager
def _writing(target: AnyPath) -> Iterator[None]:
  """Turns an `OSError` into a `CheckpointError` that names the target."""
  try:
    yield
  except OSError as error:
    raise CheckpointError(
      f"{target}: cannot be written ({error}); HIMAP_JAX_CACHE names the folder of cached copies"
    ) from error


def copy_of_files(directory: epath.Path, cache_dir: pathlib.Path) -> pathlib.Path:
  """A cached copy of a finished conversion in object storage, without parameters; `CheckpointError` if none."""
  marker = read_marker(directory)
  if marker is None or remote.is_unfinished(directory):
    raise CheckpointError(
      f"{directory}: no converted checkpoint; write one with python -m himap_jax.convert --target={directory}"
    )
  files = sorted(path for path in directory.iterdir() if path.name != PARAMS)
  stats = [(path.name, stat.length, stat.mtime) for path in files for stat in (path.stat(),)]
  digest = hashlib.sha256(f"{directory} {marker['fingerprint']} {stats}".encode()).hexdigest()[:16]
  copy = cache_dir / "remote" / f"{directory.name}-{digest}"
  if copy.exists():
    return copy
  with locked(copy):
    if not copy.exists():  # another process may have copied them by now
      with new_directory(copy) as (work, _):
        for path in files:
          (work / path.name).write_bytes(path.read_bytes())
  return copy
