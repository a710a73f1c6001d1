"""Loads parameters onto devices, each device its own shard, from published or from converted checkpoints.

Besides the loaded parameters, the host holds one shard of one parameter, or `READ_BYTES` of a converted checkpoint.
"""

import contextlib
import dataclasses
import hashlib
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from orbax.checkpoint import v1 as ocp
from safetensors import SafetensorError

from checkpoints_convert import remote
from checkpoints_convert.digest import content_digest, tree_digest
from checkpoints_convert.errors import CheckpointError
from checkpoints_convert.messages import first_line, some
from checkpoints_convert.names import Parameter, Path
from checkpoints_convert.progress import byte_bar
from checkpoints_convert.source import AnyPath
from checkpoints_convert.stored import Index

READ_BYTES = 256 << 20

# Shape, dtype and sharding of the wanted parameters, by path.
Targets = Mapping[Path, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class PublishedWeights:
  """The weights of a checkpoint in the Hugging Face layout.

  Attributes:
    parameters: the parameters to read.
    cache_dir: cache of file digests.
    is_int8: always False; see `ConvertedWeights.is_int8`.
  """

  directory: pathlib.Path
  parameters: tuple[Parameter, ...]
  cache_dir: pathlib.Path
  is_int8: bool = dataclasses.field(default=False, init=False)

  def read(self, targets: Targets) -> Iterator[tuple[Path, jax.Array]]:
    """Reads parameters lazily, in their order on disk; raises `CheckpointError` if they cannot be read."""
    wanted = [parameter for parameter in self.parameters if parameter.path in targets]
    with _bar(sum(parameter.tensor.num_bytes for parameter in wanted)) as bar:
      for parameter in wanted:
        try:
          array = _place(parameter.reader(), targets[parameter.path])
        except (SafetensorError, OSError) as error:
          raise CheckpointError(f"{parameter.tensor.path}: cannot be read ({first_line(error)})") from error
        bar.update(parameter.tensor.num_bytes)
        yield parameter.path, array

  def digest(self) -> str:
    """Digest of the checkpoint's files; the first call reads them all."""
    files = {parameter.tensor.path for parameter in self.parameters}
    return content_digest(self.directory, files, self.cache_dir)


@dataclasses.dataclass(frozen=True)
class ConvertedWeights:
  """The weights of a converted checkpoint.

  Attributes:
    path: directory of the parameters, local or in object storage.
    directory: local directory of the other files, or of their copy.
    marker: see `read_marker`.
    cache_dir: cache of file digests.
  """

  path: AnyPath
  directory: pathlib.Path
  marker: Mapping[str, Any]
  cache_dir: pathlib.Path

  @property
  def is_int8(self) -> bool:
    """Whether the weights of the decoder's linear layers are int8 values and scales."""
    return self.marker.get("int8_weights", False)

  def read(self, targets: Targets) -> Iterator[tuple[Path, jax.Array]]:
    """Reads parameters in the order of `targets`, a few at a time.

    Raises:
      CheckpointError: as `PublishedWeights.read`; the files are not those that were written (those in object storage, and
        copies of them, are not compared); or the targets are not the parameters that are stored.
    """
    expected = self.marker.get("params", "")
    is_compared = expected is not None and not remote.is_remote(self.path)
    if is_compared and tree_digest(self.path, self.cache_dir) != expected:
      raise CheckpointError(
        f"{self.path}: damaged: its files are not those that were converted; remove the folder {self.directory} and convert "
        "the checkpoint again"
      )
    self._check_names_and_shapes(targets)
    sizes = {path: math.prod(target.shape) * target.dtype.itemsize for path, target in targets.items()}
    context = ocp.Context()
    context.pytree_options.loading.partial_load = True
    # a parameter may be stored in float32 and loaded in a dtype of half the size
    context.memory_options.read_concurrent_bytes = max(READ_BYTES, *(2 * size for size in sizes.values())) + 1
    with _bar(sum(sizes.values())) as bar:
      for batch in _batches(sizes):
        with self._restoring(), context:
          tree = ocp.load(self.path, traverse_util.unflatten_dict({path: targets[path] for path in batch}))
        arrays = traverse_util.flatten_dict(tree)
        del tree
        for path in batch:
          bar.update(sizes[path])
          yield path, arrays.pop(path)

  def _check_names_and_shapes(self, targets: Targets) -> None:
    with self._restoring():
      stored = traverse_util.flatten_dict(ocp.metadata(self.path).metadata)
    names = {"missing": targets.keys() - stored.keys(), "unexpected": stored.keys() - targets.keys()}
    common = targets.keys() & stored.keys()
    names["mis-shaped"] = {path for path in common if tuple(stored[path].shape) != targets[path].shape}
    if any(names.values()):
      report = "; ".join(
        f"{len(own)} {kind} ({some(sorted(map('.'.join, own)))})" for kind, own in names.items() if own
      )
      raise CheckpointError(
        f"{self.directory}: the weights are not those of the model that config.json describes: {report}; restore "
        "config.json, or convert the checkpoint again"
      )

  @contextlib.contextmanager
  def _restoring(self) -> Iterator[None]:
    """Turns errors of Orbax into a `CheckpointError`."""
    try:
      yield
    except (ValueError, OSError, KeyError) as error:
      raise CheckpointError(
        f"{self.path}: cannot restore the parameters ({first_line(error)}); convert the checkpoint again"
      ) from error

  def digest(self) -> str:
    """Digest of the files and of the source checkpoint."""
    files = content_digest(self.directory, (), self.cache_dir)
    return hashlib.sha256(f"{self.marker['fingerprint']} {files}".encode()).hexdigest()


Weights = PublishedWeights | ConvertedWeights


def _place(read: Callable[[Index], np.ndarray], target: jax.ShapeDtypeStruct) -> jax.Array:
  """An array whose shards are read and transferred one after another; devices with the same shard share the read."""
  parts: dict[tuple[tuple[int | None, int | None], ...], tuple[Index, list[jax.Device]]] = {}
  for device, index in target.sharding.addressable_devices_indices_map(target.shape).items():
    parts.setdefault(tuple((one.start, one.stop) for one in index), (index, []))[1].append(device)
  arrays = []
  for index, devices in parts.values():
    part = read(index).astype(target.dtype, copy=False)
    arrays += jax.block_until_ready([jax.device_put(part, device) for device in devices])
  return jax.make_array_from_single_device_arrays(target.shape, target.sharding, arrays)


def _batches(sizes: Mapping[Path, int]) -> Iterator[list[Path]]:
  batch: list[Path] = []
  for path, size in sizes.items():
    if batch and size + sum(sizes[one] for one in batch) > READ_BYTES:
      yield batch
      batch = []
    batch.append(path)
  if batch:
    yield batch


def _bar(num_bytes: int) -> Any:
  return byte_bar(num_bytes, "reading the weights", shown=jax.process_index() == 0)
