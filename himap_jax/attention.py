"""Scaled dot-product attention.

Axes: B batch, S query slots, T key slots, N query heads, K key heads, H head dim.
"""

import jax
from jaxtyping import Array, Bool, Float


def attend(
  query: Float[Array, "B S N H"],
  key: Float[Array, "B T K H"],
  value: Float[Array, "B T K H"],
  mask: Bool[Array, "B 1 S T"] | None = None,
  *,
  is_causal: bool = False,
) -> Float[Array, "B S N H"]:
  """Attention with the softmax in float32; grouped-query when `K` divides `N`."""
  with jax.numpy_dtype_promotion("standard"):  # JAX's implementation mixes dtypes inside
    return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=is_causal)
