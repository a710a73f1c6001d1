"""Kernels for XLA on CPU, which prevent conversions, transposes and copies of weights and caches while decoding.

Axes: as in `xla`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from himap_jax.model.kernels import Kernels, is_quantized, masks, xla
from himap_jax.model.kernels.masks import Mask

BLOCK = 256  # query slots

# XLA hoists the conversion (one row) or transpose (few rows) of all weights out of a decode loop, so it holds them
# twice. Padding to more rows, and a barrier that ties each weight to its input, prevent this.
MIN_ROWS = 2

INT8_MAX = 127


def attention(
  query: Float[Array, "B S N H"],
  key: Float[Array, "B T K H"],
  value: Float[Array, "B T K H"],
  mask: Mask | None = None,
  *,
  is_causal: bool = False,
  segments: Int[Array, "B S"] | None = None,
) -> Float[Array, "B S N H"]:
  """Attention in blocks of queries whose logits fit the processor's cache; skips keys hidden by causality."""
  mask = masks.in_segments(mask, segments)
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
      visible = masks.where_seen(causal, visible)
    blocks.append(_block(query[:, :, :, first:last], key[:, :, :seen], value[:, :, :seen], visible))
  context = jnp.concatenate(blocks, axis=3).reshape(batch, num_heads, slots, head_dim)
  return jnp.swapaxes(context, 1, 2)


def _block(
  query: Float[Array, "B K G S H"],
  key: Float[Array, "B K T H"],
  value: Float[Array, "B K T H"],
  mask: Mask | None,
) -> Float[Array, "B K G S H"]:
  logits = jnp.einsum("BKGSH,BKTH->BKGST", query, key, preferred_element_type=jnp.float32) * query.shape[-1] ** -0.5
  if mask is not None:
    logits = masks.masked(logits, mask[:, :, None])
  weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
  context = jnp.einsum("BKGST,BKTH->BKGSH", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
  return (context / weights.sum(axis=-1, keepdims=True)).astype(value.dtype)


def cache_attention(
  query: Float[Array, "B 1 N H"],
  prompt: tuple[Float[Array, "B K T H"], Float[Array, "B K H T"], Shaped[Array, "B 1 1 T"]],
  new: tuple[Float[Array, "B K M H"], Float[Array, "B K M H"], Shaped[Array, "B 1 1 M"]],
) -> Float[Array, "B 1 N H"]:
  """As `xla.cache_attention`; reads every key and value once, in its stored layout.

  XLA would convert the cache to float32 for a product with one column. It reads a matrix several times as fast as the
  left operand of a product with few columns, and only a barrier keeps it on the left.
  """
  (keys, values, mask), (new_keys, new_values, new_mask) = prompt, new
  batch, _, num_heads, head_dim = query.shape
  group = num_heads // keys.shape[1]
  padding = [(0, 0), (0, 0), (0, max(0, MIN_ROWS - group)), (0, 0)]
  query = query.reshape(batch, keys.shape[1], group, head_dim)
  logits = jnp.einsum("BKTH,BKGH->BKTG", keys, jnp.pad(query, padding), preferred_element_type=jnp.float32)
  logits = jnp.swapaxes(jax.lax.optimization_barrier(logits), 2, 3)[:, :, :group]
  new_logits = jnp.einsum("BKGH,BKMH->BKGM", query.astype(jnp.float32), new_keys)
  weights, new_weights = xla.softmax_of_both((logits, new_logits), (mask, new_mask), head_dim)
  padded = jnp.pad(weights.astype(values.dtype), padding)
  context = jnp.einsum("BKHT,BKGT->BKHG", values, padded, preferred_element_type=jnp.float32)
  context = jnp.swapaxes(jax.lax.optimization_barrier(context), 2, 3)[:, :, :group]
  context += jnp.einsum("BKGM,BKMH->BKGH", new_weights, new_values)
  return context.astype(values.dtype).reshape(batch, 1, num_heads, head_dim)


def product(x: Float[Array, "B S D"], weight: Any) -> Float[Array, "B S F"]:
  """As `xla.product`; for one slot per row computed as `weight · xᵀ`, which reads each weight once."""
  if x.shape[1] > 1:
    return xla.product(x, weight)
  batch = x.shape[0]
  x = jnp.pad(x, [(0, max(0, MIN_ROWS - batch)), (0, 0), (0, 0)])
  x, weight = jax.lax.optimization_barrier((x, weight))
  if is_quantized(weight):
    y = _int8_product(x, weight)
  else:
    y = jnp.einsum("FD,BSD->FBS", weight, x, preferred_element_type=jnp.float32)
  # Without the barrier XLA would fuse the transpose into the product, which is slower.
  return jnp.moveaxis(jax.lax.optimization_barrier(y), 0, -1)[:batch]


def _int8_product(x: Float[Array, "B 1 D"], weight: Any) -> Float[Array, "F B 1"]:
  """`weight · xᵀ` as an integer product; for any other, XLA would convert the whole weight.

  Activations are the sum of two int8 terms, with an error of at most 2⁻¹⁶ of a token's largest activation: less than
  bfloat16's.
  """
  x = x[:, 0].astype(jnp.float32)
  coarse = jnp.maximum(jnp.abs(x).max(axis=1, keepdims=True), jnp.finfo(jnp.float32).tiny * INT8_MAX) / INT8_MAX
  fine = coarse / (2 * INT8_MAX)
  high = jnp.round(x / coarse)
  low = jnp.round((x - high * coarse) / fine)
  terms = jnp.concatenate([high, low]).astype(jnp.int8)
  high, low = jnp.split(jnp.einsum("FD,BD->FB", weight.qvalue, terms, preferred_element_type=jnp.int32), 2, axis=1)
  y = high.astype(jnp.float32) * coarse[:, 0][None] + low.astype(jnp.float32) * fine[:, 0][None]
  return (y * jnp.broadcast_to(weight.scale, y.shape))[:, :, None]


def weight_gradient(g: Float[Array, "B S F"], x: Float[Array, "B S D"]) -> Float[Array, "F D"]:
  """As `xla.weight_gradient`, in float32, since XLA lacks this product in bfloat16.

  XLA transposes a copy of the left operand, so it is the smaller.
  """
  g, x = g.astype(jnp.float32), x.astype(jnp.float32)
  return xla.weight_gradient(g, x) if g.shape[-1] <= x.shape[-1] else xla.weight_gradient(x, g).T


def take_rows(table: Float[Array, "V D"], ids: Int[Array, "*I"]) -> Float[Array, "*I D"]:
  """Rows of a table; the barrier keeps XLA from converting the table ahead of a decode loop."""
  return xla.take_rows(*jax.lax.optimization_barrier((table, ids)))


KERNELS = Kernels(
  attention,
  cache_attention,
  product,
  weight_gradient,
  take_rows,
  new_token_dtype=lambda dtype: jnp.dtype(jnp.float32),  # written in place, and read faster
  # Otherwise XLA converts all int8 weights at the start of a program and holds every copy.
  int8_compiler_options=(("xla_cpu_scheduler_type", "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"),),
  prefill_tokens=1024,
  most_slots=16,
)
