"""Attention that image tokens receive, for the few query rows that a score needs.

Axes: B batch, S slots, Q rows, R rows of a block, N query heads, K key heads, G query heads per key head, H head dim,
M image tokens.

Only these rows get a softmax of their own, in float32: a layer's attention does not expose its probabilities, so any
implementation of it can be used. Rows are taken block by block, so that no array has rows × slots × heads of all.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from himap_jax.inputs import pad_to

BLOCK = 64  # rows


def attention_of_rows(
  query: Float[Array, "B Q N H"],
  key: Float[Array, "B S K H"],
  visible: Bool[Array, "B Q S"],
  valid: Bool[Array, "B Q"],
  scale: float,
  gain: Float[Array, "B Q S"] | None = None,
) -> Float[Array, "B K G Q S"]:
  """Attention probabilities of rotated queries over the rotated keys of all slots, by head; zeros of invalid rows.

  `gain`, if given, is added to the logits.
  """
  num_keys = key.shape[2]
  batch, num_rows, num_heads, head_dim = query.shape
  query = jnp.swapaxes(query, 1, 2).reshape(batch, num_keys, num_heads // num_keys, num_rows, head_dim)
  logits = jnp.einsum("BKGQH,BKSH->BKGQS", query, jnp.swapaxes(key, 1, 2), preferred_element_type=jnp.float32)
  seen = (visible | ~valid[:, :, None])[:, None, None]
  logits = logits * scale if gain is None else logits * scale + gain[:, None, None]
  attention = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1)
  return jnp.where(valid[:, None, None, :, None], attention, 0)


def sum_over_rows(
  reduced: Callable[[Float[Array, "B K G R S"]], Float[Array, "B *D"]],
  query: Float[Array, "B Q N H"],
  key: Float[Array, "B S K H"],
  visible: Bool[Array, "B Q S"],
  valid: Bool[Array, "B Q"],
  scale: float,
  gain: Float[Array, "B Q S"] | None = None,
) -> Float[Array, "B *D"]:
  """The sum over blocks of rows of what `reduced` makes of the attention of each."""

  def of_block(query: Array, visible: Array, valid: Array, gain: Array | None) -> Float[Array, "B *D"]:
    return reduced(attention_of_rows(query, key, visible, valid, scale, gain))

  num_rows = query.shape[1]
  if num_rows <= BLOCK:
    return of_block(query, visible, valid, gain)

  def blocks(x: Shaped[Array, "B Q *D"]) -> Shaped[Array, "n B R *D"]:
    return jnp.moveaxis(pad_to(x, {1: BLOCK}).reshape(len(x), -1, BLOCK, *x.shape[2:]), 1, 0)

  inputs = jax.tree.map(blocks, (query, visible, valid, gain))
  shape = jax.eval_shape(of_block, *jax.tree.map(lambda x: x[0], inputs))
  zero = jnp.zeros(shape.shape, shape.dtype)
  total, _ = jax.lax.scan(lambda total, block: (total + of_block(*block), None), zero, inputs)
  return total


def received_by_slots(
  query: Float[Array, "B Q N H"],
  key: Float[Array, "B S K H"],
  visible: Bool[Array, "B Q S"],
  valid: Bool[Array, "B Q"],
  scale: float,
  gain: Float[Array, "B Q S"] | None = None,
) -> Float[Array, "B S"]:
  """Attention that all slots receive from the valid rows, summed over rows, averaged over heads."""
  # Heads that are sharded are summed once, after all rows.
  by_head = sum_over_rows(lambda attention: attention.sum(axis=3), query, key, visible, valid, scale, gain)
  return by_head.sum(axis=(1, 2)) / query.shape[2]
