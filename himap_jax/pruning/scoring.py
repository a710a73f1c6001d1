"""Attention that image tokens receive, for the few query rows that a score needs.

Axes: B batch, S slots, Q rows, N query heads, K key heads, G query heads per key head, H head dim, M image tokens.

Only these rows get a softmax of their own, in float32: a layer's attention does not expose its probabilities, so any
implementation of it can be used.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from himap_jax.inputs import Layout, take_slots


def attention_of_rows(
  query: Float[Array, "B Q N H"], key: Float[Array, "B S K H"], visible: Bool[Array, "B Q S"], scale: float
) -> Float[Array, "B K G Q S"]:
  """Attention probabilities of rotated queries over the rotated keys of all slots, by head."""
  num_keys = key.shape[2]
  batch, num_rows, num_heads, head_dim = query.shape
  query = jnp.swapaxes(query, 1, 2).reshape(batch, num_keys, num_heads // num_keys, num_rows, head_dim)
  logits = jnp.einsum("BKGQH,BKSH->BKGQS", query, jnp.swapaxes(key, 1, 2), preferred_element_type=jnp.float32)
  return jax.nn.softmax(jnp.where(visible[:, None, None], logits * scale, -jnp.inf), axis=-1)


def received_attention(
  query: Float[Array, "B Q N H"],
  key: Float[Array, "B S K H"],
  layout: Layout,
  rows: Int[Array, "B Q"],
  *,
  scale: float,
  valid: Bool[Array, "B Q"] | None = None,
) -> Float[Array, "B M"]:
  """Attention that image tokens receive from the valid rows, summed over rows, averaged over heads.

  `query` holds the queries of the slots `rows`; all rows are valid if `valid` is absent.
  """
  attention = attention_of_rows(query, key, layout.visible(rows), scale)
  if valid is not None:
    attention = jnp.where(valid[:, None, None, :, None], attention, 0)
  received = attention.sum(axis=(1, 2, 3)) / query.shape[2]
  return take_slots(received, layout.image_slots())
