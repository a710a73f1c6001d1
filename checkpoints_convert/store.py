"""Writes directories atomically, and parameters in bounded memory."""

import contextlib
import errno
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
from safetensors import SafetensorError

from checkpoints_convert import remote
from checkpoints_convert.errors import CheckpointError
from checkpoints_convert.marker import read_marker
from checkpoints_convert.messages import first_line
from checkpoints_convert.names import Path
from checkpoints_convert.source import PARAMS, TEMPLATES, AnyPath

BATCH_BYTES = 128 << 20
CHUNK_BYTES = 64 << 20
METADATA_BYTES = 1 << 20  # room for Orbax's metadata beside a batch
FORBIDDEN = "*?["
_NO_SPACE = os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT)


def save_params(directory: AnyPath, tensors: Iterable[tuple[Path, np.ndarray]]) -> None:
  """Writes parameters as one Orbax checkpoint, with at most `BATCH_BYTES` and one tensor in memory.

  `directory` is created; `tensors`, pairs of a path in the parameter tree and an array, is consumed lazily.

  Raises:
    OSError: the disk is full.
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
        _save(directory, batch, num_bytes)
        batch, num_bytes = {}, 0
      batch[path] = array
      num_bytes += array.nbytes
      del array
    if batch:
      _save(directory, batch, num_bytes)
    ocp.partial.finalize(directory)


def _save(directory: AnyPath, batch: dict[Path, np.ndarray], num_bytes: int) -> None:
  """Adds tensors of so many bytes. A disk that is too small is noticed first: Orbax's threads would print tracebacks."""
  if not remote.is_remote(directory):
    disk = shutil.disk_usage(directory.parent)
    if disk.total and disk.free < num_bytes + METADATA_BYTES:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  ocp.partial.save(directory, traverse_util.unflatten_dict(batch))


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
      if not path.exists():
        path.touch()  # raises where no file can be made, which the lock would wait for
      print(f"waiting for the process that is writing {target}", file=sys.stderr)
      lock.acquire()
  try:
    yield
  finally:
    path.unlink(missing_ok=True)  # while the lock is held, so that a waiting process notices and opens a new one
    lock.release()


@contextlib.contextmanager
def _writing(target: AnyPath) -> Iterator[None]:
  """Turns errors of writing into a `CheckpointError` that names the target."""
  try:
    yield
  except Exception as error:
    # Orbax and tokenizers have no type of their own for a full disk.
    is_full = type(error) in (ValueError, Exception) and any(reason in str(error) for reason in _NO_SPACE)
    if not is_full and not isinstance(error, OSError | SafetensorError):
      raise
    raise CheckpointError(
      f"{target}: cannot be written ({first_line(error)}); HIMAP_JAX_CACHE names the folder of cached copies"
    ) from error


def copy_of_files(directory: epath.Path, cache_dir: pathlib.Path) -> pathlib.Path:
  """A cached copy of a finished conversion in object storage, without parameters; `CheckpointError` if none."""
  marker = read_marker(directory)
  if marker is None or remote.is_unfinished(directory):
    raise CheckpointError(
      f"{directory}: no converted checkpoint; write one with python -m himap_jax.convert --target={directory}"
    )
  files = [path.name for path in directory.iterdir() if path.name not in (PARAMS, TEMPLATES)]
  files += [f"{TEMPLATES}/{path.name}" for path in (directory / TEMPLATES).glob("*")]
  stats = [(name, stat.length, stat.mtime) for name in sorted(files) for stat in ((directory / name).stat(),)]
  digest = hashlib.sha256(f"{directory} {marker['fingerprint']} {stats}".encode()).hexdigest()[:16]
  copy = cache_dir / "remote" / f"{directory.name}-{digest}"
  if copy.exists():
    return copy
  with locked(copy):
    if not copy.exists():  # another process may have copied them by now
      with new_directory(copy) as (work, _):
        for name in files:
          (work / name).parent.mkdir(exist_ok=True)
          (work / name).write_bytes((directory / name).read_bytes())
  return copy
