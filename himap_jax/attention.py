"""Scaled dot-product attention, and the implementation that each platform uses.

Axes: B batch, S query slots, T key slots, N query heads, K key heads, G query heads per key head, H head dim,
M slots of new tokens.
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
  batch, slots, num_heads, head_dim = query.shape
  query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
  query = query.reshape(batch, key.shape[1], -1, slots, head_dim)
  blocks = []
  for first in range(0, slots, BLOCK):
    last = min(first + BLOCK, slots)
    seen = last if is_causal else key.shape[2]
    visible = None if mask is None else mask[:, :, first:last, :seen]
    if is_causal:
      slot = jnp.arange(seen, dtype=jnp.int32)
      causal = (slot[None] <= slot[first:last, None])[None, None]
      visible = causal if visible is None else visible & causal
    blocks.append(_block(query[:, :, :, first:last], key[:, :, :seen], value[:, :, :seen], visible))
  context = jnp.concatenate(blocks, axis=3).reshape(batch, num_heads, slots, head_dim)
  return jnp.swapaxes(context, 1, 2)


def _block(
  query: Float[Array, "B K G S H"],
  key: Float[Array, "B K T H"],
  value: Float[Array, "B K T H"],
  mask: Bool[Array, "#B 1 S T"] | None,
) -> Float[Array, "B K G S H"]:
  logits = jnp.einsum("BKGSH,BKTH->BKGST", query, key, preferred_element_type=jnp.float32) * query.shape[-1] ** -0.5
  if mask is not None:
    logits = jnp.where(mask[:, :, None], logits, jnp.finfo(jnp.float32).min)
  weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
  context = jnp.einsum("BKGST,BKTH->BKGSH", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
  return (context / weights.sum(axis=-1, keepdims=True)).astype(value.dtype)


def attend_to_cache(
  query: Float[Array, "B 1 N H"],
  keys: Float[Array, "B K T H"],
  values: Float[Array, "B K H T"],
  mask: Bool[Array, "B 1 1 T"],
  new_keys: Float[Array, "B K M H"],
  new_values: Float[Array, "B K M H"],
  new_mask: Bool[Array, "B 1 1 M"],
) -> Float[Array, "B 1 N H"]:
  """Attention of one new slot a row over its prompt and the tokens after it, for any platform: it reads each once, as it lies."""
  batch, _, num_heads, head_dim = query.shape
  group = num_heads // keys.shape[1]
  query = query.reshape(batch, keys.shape[1], group, head_dim)
  # XLA on CPU would convert the cache to float32 for a product of one column, and reads a matrix several times as fast on the
  # left of a product of few columns, where it would not leave it.
  padded = jnp.pad(query, [(0, 0), (0, 0), (0, max(0, 2 - group)), (0, 0)])
  logits = jnp.einsum("BKTH,BKGH->BKTG", keys, padded, preferred_element_type=jnp.float32)
  logits = jnp.swapaxes(jax.lax.optimization_barrier(logits), 2, 3)[:, :, :group]
  new_logits = jnp.einsum("BKGH,BKMH->BKGM", query.astype(jnp.float32), new_keys)
  both = jnp.concatenate([logits, new_logits], axis=-1) * head_dim**-0.5
  visible = jnp.concatenate([mask, new_mask], axis=-1)
  weights = jax.nn.softmax(jnp.where(visible, both, jnp.finfo(jnp.float32).min), axis=-1)
  weights, new_weights = jnp.split(weights, [keys.shape[2]], axis=-1)
  padded = jnp.pad(weights.astype(values.dtype), [(0, 0), (0, 0), (0, max(0, 2 - group)), (0, 0)])
  context = jnp.einsum("BKHT,BKGT->BKHG", values, padded, preferred_element_type=jnp.float32)
  context = jnp.swapaxes(jax.lax.optimization_barrier(context), 2, 3)[:, :, :group]
  context += jnp.einsum("BKGM,BKMH->BKGH", new_weights, new_values)
  return context.astype(values.dtype).reshape(batch, 1, num_heads, head_dim)


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
  """For TPU: JAX's Pallas kernel, each device for its rows and heads, and JAX's own implementation for what that does not take."""
  if mask is not None or not is_causal or query.shape[-1] % SPLASH_HEAD_DIM:
    return xla_attention(query, key, value, mask, is_causal=is_causal)
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

  slots = query.shape[1]
  unused = -slots % SPLASH_BLOCK  # at the end, where causality hides them
  spec = sharding.heads(mesh, query.shape[2], key.shape[2])
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
