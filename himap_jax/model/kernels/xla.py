"""Kernels in plain JAX, for any platform.

Axes: B batch, S query slots, T key slots, N query heads, K key heads, G query heads per key head, H head dim, M slots
of new tokens, D in features, F out features.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from himap_jax.model.kernels import Kernels, is_quantized
from himap_jax.model.kernels.masks import Mask, as_bias, in_segments, masked


def attention(
  query: Float[Array, "B S N H"],
  key: Float[Array, "B T K H"],
  value: Float[Array, "B T K H"],
  mask: Mask | None = None,
  *,
  is_causal: bool = False,
  segments: Int[Array, "B S"] | None = None,
) -> Float[Array, "B S N H"]:
  """JAX's own attention."""
  masks = as_bias(in_segments(mask, segments))
  with jax.numpy_dtype_promotion("standard"):  # it mixes dtypes inside
    return jax.nn.dot_product_attention(query, key, value, **masks, is_causal=is_causal)


def cache_attention(
  query: Float[Array, "B 1 N H"],
  prompt: tuple[Float[Array, "B K T H"], Float[Array, "B K H T"], Shaped[Array, "B 1 1 T"]],
  new: tuple[Float[Array, "B K M H"], Float[Array, "B K M H"], Shaped[Array, "B 1 1 M"]],
) -> Float[Array, "B 1 N H"]:
  """Attention of one new token per row to keys, values and masks of the prompt and of the tokens after it.

  Both masks are of floats, which are added to the logits, or neither.
  """
  (keys, values, mask), (new_keys, new_values, new_mask) = prompt, new
  batch, _, num_heads, head_dim = query.shape
  query = query.reshape(batch, keys.shape[1], num_heads // keys.shape[1], head_dim)
  logits = jnp.einsum("BKGH,BKTH->BKGT", query, keys, preferred_element_type=jnp.float32)
  new_logits = jnp.einsum("BKGH,BKMH->BKGM", query, new_keys, preferred_element_type=jnp.float32)
  weights, new_weights = softmax_of_both((logits, new_logits), (mask, new_mask), head_dim)
  context = jnp.einsum("BKGT,BKHT->BKGH", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
  context += jnp.einsum(
    "BKGM,BKMH->BKGH", new_weights.astype(new_values.dtype), new_values, preferred_element_type=jnp.float32
  )
  return context.astype(values.dtype).reshape(batch, 1, num_heads, head_dim)


def softmax_of_both(
  logits: tuple[Float[Array, "B K G T"], Float[Array, "B K G M"]],
  masks: tuple[Shaped[Array, "B 1 1 T"], Shaped[Array, "B 1 1 M"]],
  head_dim: int,
) -> tuple[Float[Array, "B K G T"], Float[Array, "B K G M"]]:
  """One softmax over the prompt and the tokens after it, in float32."""
  both = jnp.concatenate(logits, axis=-1) * head_dim**-0.5
  visible = jnp.concatenate(masks, axis=-1)
  weights = jax.nn.softmax(masked(both, visible), axis=-1)
  prompt, new = jnp.split(weights, [logits[0].shape[-1]], axis=-1)
  return prompt, new


def product(x: Float[Array, "B S D"], weight: Any) -> Float[Array, "B S F"]:
  """`x · weightᵀ` in float32. An int8 weight is exact in any dtype of `x`; its scales multiply the product."""
  if is_quantized(weight):
    y = jnp.einsum("BSD,FD->BSF", x, weight.qvalue.astype(x.dtype), preferred_element_type=jnp.float32)
    return y * jnp.broadcast_to(weight.scale[:, 0], y.shape)
  return jnp.einsum("BSD,FD->BSF", x, weight, preferred_element_type=jnp.float32)


def weight_gradient(g: Float[Array, "B S F"], x: Float[Array, "B S D"]) -> Float[Array, "F D"]:
  """The gradient of a product's weight, from those of its result, in float32."""
  return jnp.einsum("BSF,BSD->FD", g, x, preferred_element_type=jnp.float32)


def take_rows(table: Float[Array, "V D"], ids: Int[Array, "*I"]) -> Float[Array, "*I D"]:
  """Rows of a table."""
  return jnp.take(table, ids, axis=0, mode="clip")


KERNELS = Kernels(attention, cache_attention, product, weight_gradient, take_rows, new_token_dtype=jnp.dtype)
