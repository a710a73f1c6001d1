"""Scores of image tokens: what a pruning stage ranks them by.

Axes: B batch, S slots, Q scored rows, N query heads, K key heads, G query heads per key head, H head dim, M image tokens.

A score sees the projections of the layer before its stage and the layout, and returns one float32 number per image
token; the highest are kept. Only the rows that a score sums over get a softmax of their own, in float32: the layer's
attention itself stays fused.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from himap_jax.decoder import Projections
from himap_jax.layout import Layout

Score = Callable[[Projections, Layout], Float[Array, "B M"]]


def instruction_attention(projections: Projections, layout: Layout) -> Float[Array, "B M"]:
  """Attention that each image token receives from all tokens after the image (HiMAP, arXiv 2503.13108, Eq. 8)."""
  num_slots = projections.query.shape[1]
  after = layout.image_start + layout.num_image_tokens
  num_rows = num_slots - layout.num_image_tokens
  rows = after[:, None] + jnp.arange(num_rows, dtype=jnp.int32)[None]
  return received_attention(projections, layout, rows, rows < layout.length[:, None])


def image_attention(projections: Projections, layout: Layout) -> Float[Array, "B M"]:
  """Attention that each image token receives from the image tokens (HiMAP, arXiv 2503.13108, Eq. 9)."""
  rows = layout.image_slots()
  return received_attention(projections, layout, rows, jnp.ones_like(rows, dtype=bool))


def received_attention(
  projections: Projections, layout: Layout, rows: Int[Array, "B Q"], valid: Bool[Array, "B Q"]
) -> Float[Array, "B M"]:
  """Σ over the valid rows of the causal attention probabilities, averaged over heads, in the image's columns."""
  num_slots, num_keys = projections.key.shape[1:3]
  rows = jnp.minimum(rows, num_slots - 1)
  query = jnp.take_along_axis(projections.query, rows[:, :, None, None], axis=1)
  batch, num_rows, num_heads, head_dim = query.shape
  query = query.reshape(batch, num_rows, num_keys, num_heads // num_keys, head_dim)
  logits = jnp.einsum("BQKGH,BSKH->BKGQS", query, projections.key, preferred_element_type=jnp.float32)
  causal = jnp.arange(num_slots, dtype=jnp.int32)[None, None] <= rows[:, :, None]
  logits = jnp.where(causal[:, None, None], logits * head_dim**-0.5, -jnp.inf)
  attention = jax.nn.softmax(logits, axis=-1)
  received = jnp.einsum("BKGQS,BQ->BS", attention, valid.astype(jnp.float32)) / num_heads
  return jnp.take_along_axis(received, layout.image_slots(), axis=1)
