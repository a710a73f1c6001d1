"""Kernels for TPUs: JAX's splash attention in Pallas, per device.

Axes: as in `xla`.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float

from himap_jax.model.kernels import Kernels, xla

BLOCK = 128  # slots of splash attention's default blocks
HEAD_DIM = 64  # splash attention needs a multiple


def attention(
  query: Float[Array, "B S N H"],
  key: Float[Array, "B T K H"],
  value: Float[Array, "B T K H"],
  mask: Bool[Array, "#B 1 S T"] | None = None,
  *,
  is_causal: bool = False,
  on_devices: tuple[Mesh, Callable[[int, int], PartitionSpec]],
  interpret: bool = False,
) -> Float[Array, "B S N H"]:
  """Splash attention; JAX's own attention for masks, non-causal attention and other head dims.

  Args:
    on_devices: the mesh, and a function from the numbers of query and key heads to the sharding of `[B, heads, S, H]`.
    interpret: run in Pallas' interpreter.
  """
  if mask is not None or not is_causal or query.shape[-1] % HEAD_DIM:
    return xla.attention(query, key, value, mask, is_causal=is_causal)
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

  slots = query.shape[1]
  unused = -slots % BLOCK  # at the end, where causality hides them
  mesh, spec_of = on_devices
  spec = spec_of(query.shape[2], key.shape[2])
  num_heads = query.shape[2] // (mesh.shape[spec[1]] if spec[1] else 1)
  masks = [splash_attention_mask.CausalMask((slots + unused,) * 2)] * num_heads
  kernel = splash_attention_kernel.make_splash_mha(
    splash_attention_mask.MultiHeadMask(masks), head_shards=1, q_seq_shards=1, interpret=interpret
  )
  by_device = jax.shard_map(jax.vmap(kernel), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
  heads_first = (
    jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, unused), (0, 0)))
    for x in (query * query.shape[-1] ** -0.5, key, value)
  )
  return jnp.swapaxes(by_device(*heads_first)[:, :, :slots], 1, 2)


@functools.lru_cache
def kernels(mesh: Mesh, spec_of: Callable[[int, int], PartitionSpec]) -> Kernels:
  """The kernels for a mesh; see `attention`."""
  return dataclasses.replace(xla.KERNELS, attention=functools.partial(attention, on_devices=(mesh, spec_of)))
