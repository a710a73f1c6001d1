"""Attention that image tokens receive, computed for the few query rows that a score needs.

Axes: B batch, S slots, Q rows, N query heads, K key heads, G query heads per key head, H head dim, M image tokens.

Only these rows get a softmax of their own, in float32: the layer's attention does not give its probabilities away, so
that any implementation of it will do.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from himap_jax.inputs import Layout, take_slots


def attention_of_rows(
  query: Float[Array, "B Q N H"], key: Float[Array, "B S K H"], visible: Bool[Array, "B Q S"], scale: float
) -> Float[Array, "B K G Q S"]:
  """Attention probabilities of some rotated queries over all slots' rotated keys, by head; `scale` is the logits'."""
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
  """Σ over the valid rows of the attention probabilities, averaged over heads, in the columns of `layout.image_slots`.

  `query` are those of the slots `rows`; `valid` says which of them count, all of them where absent.
  """
  attention = attention_of_rows(query, key, layout.visible(rows), scale)
  if valid is not None:
    attention = jnp.where(valid[:, None, None, :, None], attention, 0)
  received = attention.sum(axis=(1, 2, 3)) / query.shape[2]
  return take_slots(received, layout.image_slots())
