"""Attention that image tokens receive, computed for the few query rows that a score needs.

Axes: B batch, S slots, Q scored rows, N query heads, K key heads, G query heads per key head, H head dim, M image tokens.

Only these rows get a softmax of their own, in float32: the layer's attention does not give its probabilities away, so that
any implementation of it will do.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from himap_jax.decoder import Projections
from himap_jax.layout import Layout


def attention_of_rows(
  query: Float[Array, "B Q N H"], key: Float[Array, "B S K H"], rows: Int[Array, "B Q"]
) -> Float[Array, "B K G Q S"]:
  """Causal attention probabilities of the queries of some slots over all slots, by head."""
  num_slots, num_keys = key.shape[1:3]
  batch, num_rows, num_heads, head_dim = query.shape
  query = jnp.swapaxes(query, 1, 2).reshape(batch, num_keys, num_heads // num_keys, num_rows, head_dim)
  logits = jnp.einsum("BKGQH,BKSH->BKGQS", query, jnp.swapaxes(key, 1, 2), preferred_element_type=jnp.float32)
  causal = jnp.arange(num_slots, dtype=jnp.int32)[None, None] <= rows[:, :, None]
  return jax.nn.softmax(jnp.where(causal[:, None, None], logits * head_dim**-0.5, -jnp.inf), axis=-1)


def queries_of(projections: Projections, rows: Int[Array, "B Q"]) -> Float[Array, "B Q N H"]:
  """The queries of some slots."""
  return jnp.take_along_axis(projections.query, rows[:, :, None, None], axis=1)


def received_attention(
  query: Float[Array, "B Q N H"],
  key: Float[Array, "B S K H"],
  layout: Layout,
  rows: Int[Array, "B Q"],
  valid: Bool[Array, "B Q"] | None = None,
) -> Float[Array, "B M"]:
  """Σ over the valid rows of the attention probabilities, averaged over heads, in the image's columns."""
  attention = attention_of_rows(query, key, rows)
  if valid is not None:
    attention = jnp.where(valid[:, None, None, :, None], attention, 0)
  received = attention.sum(axis=(1, 2, 3)) / query.shape[2]
  return jnp.take_along_axis(received, layout.image_slots(), axis=1)
