"""Writes a directory that appears whole or not at all, and parameters into it in bounded memory."""

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
from checkpoints_convert.marker import PARAMS, read_marker
from checkpoints_convert.names import Path
from checkpoints_convert.source import AnyPath

BATCH_BYTES = 128 << 20
CHUNK_BYTES = 64 << 20
FORBIDDEN = "*?["


def save_params(directory: AnyPath, tensors: Iterable[tuple[Path, np.ndarray]]) -> None:
  """Writes parameters as one Orbax checkpoint, holding no more than `BATCH_BYTES` and one tensor of them.

  Args:
    directory: to create.
    tensors: paths in the parameter tree and arrays; consumed lazily.
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
  """A sibling of `target` to write into, renamed to `target` when the block ends and removed when it fails.

  The caller holds the lock of `target`. What an earlier process that was killed left there is removed first. In object storage
  see `remote.new_directory`.

  Yields:
    Where files go, and where parameters do.
  """
  if remote.is_remote(target):
    with remote.new_directory(target) as places:
      yield places
    return
  work = target.with_name(f".{target.name}.partial")
  shutil.rmtree(work, ignore_errors=True)
  work.mkdir(parents=True)
  try:
    yield work, work / PARAMS
    os.rename(work, target)
  except BaseException:
    shutil.rmtree(work, ignore_errors=True)
    raise


@contextlib.contextmanager
def locked(target: AnyPath) -> Iterator[None]:
  """Locks `target`; another process that asks for it says so and waits. The lock of a process that was killed is free at once.

  Object storage has no locks: there it does nothing.
  """
  if remote.is_remote(target):
    yield
    return
  path = target.with_name(f".{target.name}.lock")
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
    path.unlink(missing_ok=True)  # while it is held: a waiting process sees that and opens a new one
    lock.release()


def copy_of_files(directory: epath.Path, cache_dir: pathlib.Path) -> pathlib.Path:
  """The files of a finished conversion in object storage, without its parameters, copied into a cache until they change.

  Raises:
    CheckpointError: there is no finished conversion.
  """
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
