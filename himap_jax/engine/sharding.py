"""Sharding: the device mesh, and the mesh axis of each logical axis.

Batch rows are sharded over `data`; heads, feed-forward and vocabulary over `tensor` (Megatron-LM, arXiv 1909.08053).
The model names the logical axes of its parameters; shardings of inputs, caches and results are set here; the compiler
derives the rest.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from himap_jax.errors import UserError
from himap_jax.model.cache import SegmentCache
from himap_jax.model.config import ModelConfig
from himap_jax.model.kernels import Kernels, cpu, gpu, tpu, xla

# Logical axis → mesh axis.
RULES = {
  "batch": "data",
  "heads": "tensor",
  "key_heads": "tensor",
  "feed_forward": "tensor",
  "vocabulary": "tensor",
  "tower_heads": "tensor",
  "tower_feed_forward": "tensor",
}
AXES = ("data", "tensor")
MEMORY_FOR_PARAMETERS = 0.7  # share of device memory; the rest is for caches and temporaries


def make_mesh(data: int = 1, tensor: int = 1, *, devices: Sequence[Any] | None = None) -> Mesh:
  """A mesh of the first devices; raises `UserError` if there are too few or other processes' would be left out."""
  devices = jax.devices() if devices is None else list(devices)
  count = data * tensor
  if count > len(devices):
    raise UserError(f"a mesh of data:{data},tensor:{tensor} needs {count} devices, but there are {len(devices)}")
  if count < len(devices) and jax.process_count() > 1:
    raise UserError(f"with several processes a mesh needs all {len(devices)} devices, not {count}")
  if count == len(devices):
    return Mesh(mesh_utils.create_device_mesh((data, tensor), devices, allow_split_physical_axes=True), AXES)
  return Mesh(np.array(devices[:count]).reshape(data, tensor), AXES)


def choose_mesh(config: ModelConfig, num_bytes: int, batch_size: int | None = None) -> dict[str, int]:
  """A mesh for all devices: the least tensor parallelism with which the parameters fit, and rows over the rest.

  Args:
    num_bytes: size of the parameters.
    batch_size: a single process leaves devices idle that do not divide it; none if it is absent.
  """
  count = jax.device_count()
  stats = jax.local_devices()[0].memory_stats() or {}
  room = MEMORY_FOR_PARAMETERS * stats.get("bytes_limit", math.inf)
  heads = config.text.num_attention_heads
  sizes = [size for size in range(1, count + 1) if count % size == 0 and heads % size == 0]
  tensor = next((size for size in sizes if num_bytes / size <= room), sizes[-1])
  data = count // tensor
  if jax.process_count() == 1 and batch_size is not None:
    data = max(size for size in range(1, data + 1) if batch_size % size == 0)
  return {"data": data, "tensor": tensor}


def describe(config: ModelConfig, mesh: Mesh) -> str:
  """Describes a mesh, including what is replicated because it does not divide evenly."""
  axes = ",".join(f"{name}:{size}" for name, size in mesh.shape.items())
  device = mesh.devices.flat[0]
  text = f"{axes} of {device.device_kind} devices, {jax.process_count()} process(es)"
  wide = with_divisible_key_heads(config, mesh)
  copies = wide.text.num_key_value_heads // config.text.num_key_value_heads
  notes = [f"{copies} copies of every key head"] if copies > 1 else []
  replicated_axes = [name for name, axis in rules(wide, mesh).items() if axis is None]
  notes += [f"replicated: {', '.join(replicated_axes)}"] if replicated_axes else []
  return "; ".join([text, *notes])


def rules(config: ModelConfig, mesh: Mesh) -> dict[str, str | None]:
  """`RULES` for a model on a mesh; axes that do not divide evenly are replicated."""
  text, vision = config.text, config.vision
  sizes = {
    "heads": text.num_attention_heads,
    "key_heads": text.num_key_value_heads,
    "feed_forward": text.intermediate_size,
    "vocabulary": math.gcd(text.vocab_size, text.vocab_size + text.num_extra_embeddings),
    "tower_heads": vision.num_attention_heads,
    "tower_feed_forward": vision.intermediate_size,
  }
  return {name: None if sizes.get(name, 0) % mesh.shape[axis] else axis for name, axis in RULES.items()}


def placed(params: PyTree, logical_axes: PyTree, config: ModelConfig, mesh: Mesh) -> PyTree:
  """Adds shardings to abstract parameters, by their logical axes (`network.logical_axes`)."""
  shardings = nn.logical_to_mesh_sharding(logical_axes, mesh, tuple(rules(config, mesh).items()))
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, shardings)


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of arrays that every device holds in full."""
  return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh) -> NamedSharding:
  """The sharding of inputs and results, whose leading axis is the batch."""
  return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def cache(config: ModelConfig, mesh: Mesh) -> SegmentCache:
  """The shardings of a segment's cache."""
  entries = NamedSharding(mesh, PartitionSpec(RULES["batch"], rules(config, mesh)["key_heads"]))
  images = rows(mesh) if config.text.cross_attention_layers else None
  return SegmentCache(keys=entries, values=entries, order=rows(mesh), images=images, log_count=rows(mesh))


def heads(mesh: Mesh, num_heads: int, num_key_heads: int) -> PartitionSpec:
  """The sharding of queries, keys and values `[B, heads, S, H]` of one attention kernel."""
  is_even = math.gcd(num_heads, num_key_heads) % mesh.shape[RULES["heads"]] == 0
  return PartitionSpec(RULES["batch"], RULES["heads"] if is_even else None)


@functools.lru_cache
def kernels_for(mesh: Mesh) -> Kernels:
  """The kernels of a mesh's platform."""
  device = mesh.devices.flat[0]
  if device.platform == "cpu":
    return cpu.KERNELS
  spec_of = functools.partial(heads, mesh)
  if device.platform == "tpu":
    return tpu.kernels(mesh, spec_of)
  generation = getattr(device, "compute_capability", "").partition(".")[0]
  # cuDNN's attention needs Ampere (8) or later; AMD's capabilities are not numbers
  is_known = generation.isdecimal() and int(generation) >= 8
  return gpu.kernels(mesh, spec_of, int(generation)) if is_known else xla.KERNELS


def with_divisible_key_heads(config: ModelConfig, mesh: Mesh) -> ModelConfig:
  """The model with key heads repeated so that `tensor` divides them, if it divides the query heads; else unchanged."""
  text, size = config.text, mesh.shape[RULES["key_heads"]]
  if text.num_attention_heads % size:
    return config
  count = math.lcm(text.num_key_value_heads, size)
  return dataclasses.replace(config, text=dataclasses.replace(text, num_key_value_heads=count))


def mesh_of(tree: PyTree) -> Mesh:
  """The mesh of a tree of parameters."""
  return jax.tree.leaves(tree)[0].sharding.mesh


def num_shards(mesh: Mesh) -> int:
  """The number of parts into which rows are divided."""
  return mesh.shape[RULES["batch"]]


def from_local_rows(tree: PyTree, mesh: Mesh) -> PyTree:
  """Global arrays from each process's own rows; see `processes.Share`."""
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows(mesh), np.asarray(x)), tree)


def device_bytes(tree: PyTree) -> int:
  """Bytes of a tree of arrays, or of `jax.ShapeDtypeStruct`s, on each device."""
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def abstract_rows(tree: PyTree, mesh: Mesh, count: int) -> PyTree:
  """`jax.ShapeDtypeStruct`s of `count` rows over all processes, like those of a tree of arrays."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype, sharding=rows(mesh)), tree)


def to_local_rows(tree: PyTree) -> PyTree:
  """This process's rows of arrays with the sharding `rows`, on the host."""

  def local(x: jax.Array) -> np.ndarray:
    if x.is_fully_addressable:
      return np.asarray(x)
    shards: Mapping[int, Any] = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])

  return jax.tree.map(local, tree)
