"""Scaled dot-product attention, and the implementation that each platform uses.

Axes: B batch, S query slots, T key slots, N query heads, K key heads, G query heads per key head, H head dim.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from himap_jax import sharding

# (query, key, value, mask, is_causal) to the context of every query; `K` divides `N`, and the softmax is in float32.
# `is_causal` hides the keys after a query's own slot, beside what the mask `[B, 1, S, T]` hides.
Attend = Callable[..., Float[Array, "B S N H"]]

BLOCK = 256  # query slots, on CPU
SPLASH_BLOCK = 128  # slots of its default blocks
SPLASH_HEAD_DIM = 64  # it takes multiples


def xla_attention(
  query: Float[Array, "B S N H"],
  key: Float[Array, "B T K H"],
  value: Float[Array, "B T K H"],
  mask: Bool[Array, "B 1 S T"] | None = None,
  *,
  is_causal: bool = False,
) -> Float[Array, "B S N H"]:
  """JAX's own implementation, for any platform."""
  with jax.numpy_dtype_promotion("standard"):  # it mixes dtypes inside
    return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=is_causal)


def blockwise_attention(
  query: Float[Array, "B S N H"],
  key: Float[Array, "B T K H"],
  value: Float[Array, "B T K H"],
  mask: Bool[Array, "B 1 S T"] | None = None,
  *,
  is_causal: bool = False,
) -> Float[Array, "B S N H"]:
  """For CPU: blocks of queries whose logits stay in the processor's cache, without the keys that causality hides."""
  blocks = []
  for first in range(0, query.shape[1], BLOCK):
    last = min(first + BLOCK, query.shape[1])
    seen = last if is_causal else key.shape[1]
    visible = None if mask is None else mask[:, :, first:last, :seen]
    if is_causal:
      slot = jnp.arange(seen, dtype=jnp.int32)
      causal = (slot[None] <= slot[first:last, None])[None, None]
      visible = causal if visible is None else visible & causal
    blocks.append(_block(query[:, first:last], key[:, :seen], value[:, :seen], visible))
  return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)


def _block(
  query: Float[Array, "B S N H"],
  key: Float[Array, "B T K H"],
  value: Float[Array, "B T K H"],
  mask: Bool[Array, "#B 1 S T"] | None,
) -> Float[Array, "B S N H"]:
  batch, slots, num_heads, head_dim = query.shape
  query = query.reshape(batch, slots, key.shape[2], num_heads // key.shape[2], head_dim)
  logits = jnp.einsum("BSKGH,BTKH->BKGST", query, key, preferred_element_type=jnp.float32) * head_dim**-0.5
  if mask is not None:
    logits = jnp.where(mask[:, :, None], logits, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
  context = jnp.einsum("BKGST,BTKH->BSKGH", weights, value, preferred_element_type=jnp.float32)
  return context.astype(value.dtype).reshape(batch, slots, num_heads, head_dim)


def attend_to_cache(
  query: Float[Array, "B 1 N H"],
  keys: Float[Array, "B K T H"],
  values: Float[Array, "B K T H"],
  mask: Bool[Array, "B 1 1 T"],
) -> Float[Array, "B 1 N H"]:
  """Attention of one new slot a row over a cache, for any platform: it reads the cache once, as it lies."""
  batch, _, num_heads, head_dim = query.shape
  group = num_heads // keys.shape[1]
  query = query.reshape(batch, keys.shape[1], group, head_dim)
  # XLA on CPU would convert the cache to float32 for a product of one row.
  query = jnp.pad(query, [(0, 0), (0, 0), (0, max(0, 2 - group)), (0, 0)])
  logits = jnp.einsum("BKGH,BKTH->BKGT", query, keys, preferred_element_type=jnp.float32) * head_dim**-0.5
  weights = jax.nn.softmax(jnp.where(mask, logits, jnp.finfo(jnp.float32).min), axis=-1).astype(values.dtype)
  context = jnp.einsum("BKGT,BKTH->BKGH", weights, values, preferred_element_type=jnp.float32)
  return context[:, :, :group].astype(values.dtype).reshape(batch, 1, num_heads, head_dim)


def cudnn_attention(
  query: Float[Array, "B S N H"],
  key: Float[Array, "B T K H"],
  value: Float[Array, "B T K H"],
  mask: Bool[Array, "B 1 S T"] | None = None,
  *,
  is_causal: bool = False,
) -> Float[Array, "B S N H"]:
  """For NVIDIA GPUs: cuDNN's flash attention, and JAX's own for what that does not take."""
  head_dim = query.shape[-1]
  if mask is not None or query.dtype.itemsize != 2 or head_dim % 8 or head_dim > 128:
    return xla_attention(query, key, value, mask, is_causal=is_causal)
  return jax.nn.dot_product_attention(query, key, value, is_causal=is_causal, implementation="cudnn")


def splash_attention(
  query: Float[Array, "B S N H"],
  key: Float[Array, "B T K H"],
  value: Float[Array, "B T K H"],
  mask: Bool[Array, "B 1 S T"] | None = None,
  *,
  is_causal: bool = False,
  mesh: Mesh,
  interpret: bool = False,
) -> Float[Array, "B S N H"]:
  """For TPU: JAX's Pallas kernel, each device for its rows, and JAX's own implementation for what that does not take."""
  if mask is not None or not is_causal or query.shape[-1] % SPLASH_HEAD_DIM:
    return xla_attention(query, key, value, mask, is_causal=is_causal)
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

  slots = query.shape[1]
  unused = -slots % SPLASH_BLOCK  # at the end, where causality hides them
  masks = [splash_attention_mask.CausalMask((slots + unused,) * 2)] * query.shape[2]
  kernel = splash_attention_kernel.make_splash_mha(
    splash_attention_mask.MultiHeadMask(masks), head_shards=1, q_seq_shards=1, interpret=interpret
  )
  rows = sharding.rows(mesh).spec
  by_device = jax.shard_map(jax.vmap(kernel), mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
  heads_first = (
    jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, unused), (0, 0)))
    for x in (query * query.shape[-1] ** -0.5, key, value)
  )
  return jnp.swapaxes(by_device(*heads_first)[:, :, :slots], 1, 2)


@functools.lru_cache
def for_mesh(mesh: Mesh) -> Attend:
  """The implementation for a mesh's devices."""
  device = mesh.devices.flat[0]
  if device.platform == "cpu":
    return blockwise_attention
  if device.platform == "tpu":
    return functools.partial(splash_attention, mesh=mesh)
  generation = getattr(device, "compute_capability", "").partition(".")[0]
  if generation.isdecimal() and int(generation) >= 8:  # AMD's are named otherwise; cuDNN's begins with Ampere
    return cudnn_attention
  return xla_attention
