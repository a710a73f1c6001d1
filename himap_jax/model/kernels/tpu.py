"""Kernels for TPUs, in Pallas, per device: JAX's splash attention, and the attention that slots receive.

Axes: as in `xla`.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from himap_jax.inputs import pad_to
from himap_jax.model.kernels import Devices, Kernels, masks, xla
from himap_jax.model.kernels.masks import Mask
from himap_jax.model.kernels.received import KernelConfig, received

BLOCK = 128  # slots of splash attention's default blocks
HEAD_DIM = 64  # splash attention needs a multiple
LANES = 128
MOST_SLOTS = 4096  # of which one program of `received` holds keys and mask in a core's own memory
UNUSED = -2  # segment of slots that fill a block
RECEIVED = KernelConfig()


def attention(
  query: Float[Array, "B S N H"],
  key: Float[Array, "B T K H"],
  value: Float[Array, "B T K H"],
  mask: Mask | None = None,
  *,
  is_causal: bool = False,
  segments: Int[Array, "B S"] | None = None,
  devices: Devices,
) -> Float[Array, "B S N H"]:
  """Splash attention; JAX's own attention if nothing is hidden, or for a mask of floats, which splash does not take."""
  if mask is None and segments is None and not is_causal:
    return xla.attention(query, key, value)
  if mask is not None and mask.dtype != bool:
    return xla.attention(query, key, value, mask, is_causal=is_causal, segments=segments)
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

  slots, head_dim = query.shape[1::2]
  mesh, spec_of, interpret = devices
  spec = spec_of(query.shape[2], key.shape[2])
  num_heads = query.shape[2] // (mesh.shape[spec[1]] if spec[1] else 1)
  make_kernel = functools.partial(
    splash_attention_kernel.make_splash_mha, head_shards=1, q_seq_shards=1, interpret=interpret
  )

  if mask is not None:
    if is_causal:
      mask = mask & jnp.tril(jnp.ones(mask.shape[2:], bool))[None, None]
    mask = jnp.broadcast_to(masks.in_segments(mask, segments), (len(query), *mask.shape[1:]))
    hidden = (pad_to(mask[:, 0], {1: BLOCK, 2: BLOCK}),)
  elif segments is not None:  # slots that fill the last block are in a segment of their own
    hidden = (pad_to(segments, {1: BLOCK}, fill=UNUSED),)
  else:  # they are at the end, where causality hides them
    hidden = ()

  @jax.vmap
  def attend(query: jax.Array, key: jax.Array, value: jax.Array, *hidden: jax.Array) -> jax.Array:
    if mask is not None:
      (seen,) = hidden
      kernel = make_kernel(jnp.broadcast_to(seen[None], (num_heads, *seen.shape)))
      kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=True)  # it was made an array
      return kernel(query, key, value)
    shape = (query.shape[1], key.shape[1])
    seen = splash_attention_mask.CausalMask(shape) if is_causal else splash_attention_mask.FullMask(shape)
    kernel = make_kernel(splash_attention_mask.MultiHeadMask([seen] * num_heads))
    return kernel(query, key, value, *(splash_attention_kernel.SegmentIds(own, own) for own in hidden))

  specs = (spec, spec, spec, *(PartitionSpec(spec[0]) for _ in hidden))
  by_device = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)
  heads_first = (pad_to(jnp.swapaxes(x, 1, 2), {2: BLOCK, 3: HEAD_DIM}) for x in (query * head_dim**-0.5, key, value))
  return jnp.swapaxes(by_device(*heads_first, *hidden)[:, :, :slots, :head_dim], 1, 2)


def cache_multiple(head_dim: int) -> int:
  """The lanes of a register if a head does not fill them.

  The compiler puts the slots of such a cache into the lanes; it would copy one whose slots do not fill them before every
  loop over it.
  """
  return 1 if head_dim % LANES == 0 else LANES


def kernels(mesh: Mesh, spec_of: Callable[[int, int], PartitionSpec]) -> Kernels:
  """The kernels for a mesh."""
  devices = Devices(mesh, spec_of)
  own = functools.partial(received, devices=devices, config=RECEIVED)
  return dataclasses.replace(
    xla.KERNELS,
    attention=functools.partial(attention, devices=devices),
    received_attention=lambda num_slots: own if num_slots <= MOST_SLOTS else None,
    cache_multiple=cache_multiple,
  )
