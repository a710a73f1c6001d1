"""Kernels for TPUs: JAX's splash attention in Pallas, per device.

Axes: as in `xla`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from himap_jax.model.kernels import Kernels, xla

BLOCK = 128  # slots of splash attention's default blocks
HEAD_DIM = 64  # splash attention needs a multiple
UNUSED = -2  # segment of slots that fill a block


class Devices(NamedTuple):
  """Where splash attention runs.

  Attributes:
    spec_of: from the numbers of query and key heads to the sharding of `[B, heads, S, H]`.
    interpret: whether it runs in Pallas' interpreter.
  """

  mesh: Mesh
  spec_of: Callable[[int, int], PartitionSpec]
  interpret: bool = False


def attention(
  query: Float[Array, "B S N H"],
  key: Float[Array, "B T K H"],
  value: Float[Array, "B T K H"],
  mask: Bool[Array, "#B 1 S T"] | None = None,
  *,
  is_causal: bool = False,
  segments: Int[Array, "B S"] | None = None,
  devices: Devices,
) -> Float[Array, "B S N H"]:
  """Splash attention, if it is causal or in segments; JAX's own attention for masks and all else."""
  if mask is not None or not (is_causal or segments is not None):
    return xla.attention(query, key, value, mask, is_causal=is_causal, segments=segments)
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

  _, slots, _, head_dim = query.shape
  unused, unused_dim = -slots % BLOCK, -head_dim % HEAD_DIM
  mesh, spec_of, interpret = devices
  spec = spec_of(query.shape[2], key.shape[2])
  num_heads = query.shape[2] // (mesh.shape[spec[1]] if spec[1] else 1)
  mask_class = splash_attention_mask.CausalMask if is_causal else splash_attention_mask.FullMask
  kernel = splash_attention_kernel.make_splash_mha(
    splash_attention_mask.MultiHeadMask([mask_class((slots + unused,) * 2)] * num_heads),
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
  )
  # Unused slots are at the end, where causality hides them, and in a segment of their own.
  padded = [jnp.pad(own, ((0, 0), (0, unused)), constant_values=UNUSED) for own in (segments,) if own is not None]

  @jax.vmap
  def attend(query: jax.Array, key: jax.Array, value: jax.Array, *segments: jax.Array) -> jax.Array:
    return kernel(query, key, value, *(splash_attention_kernel.SegmentIds(own, own) for own in segments))

  specs = (spec, spec, spec, *(PartitionSpec(spec[0]) for _ in padded))
  by_device = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)
  heads_first = (
    jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, unused), (0, unused_dim)))
    for x in (query * head_dim**-0.5, key, value)
  )
  return jnp.swapaxes(by_device(*heads_first, *padded)[:, :, :slots, :head_dim], 1, 2)


@functools.lru_cache
def kernels(mesh: Mesh, spec_of: Callable[[int, int], PartitionSpec]) -> Kernels:
  """The kernels for a mesh; see `attention`."""
  return dataclasses.replace(xla.KERNELS, attention=functools.partial(attention, devices=Devices(mesh, spec_of)))
