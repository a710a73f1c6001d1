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

BLOCK = 64  # rows


def attention_of_rows(
  query: Float[Array, "B Q N H"], key: Float[Array, "B S K H"], visible: Bool[Array, "B Q S"], scale: float
) -> Float[Array, "B K G Q S"]:
  """Attention probabilities of rotated queries over the rotated keys of all slots, by head."""
  num_keys = key.shape[2]
  batch, num_rows, num_heads, head_dim = query.shape
  query = jnp.swapaxes(query, 1, 2).reshape(batch, num_keys, num_heads // num_keys, num_rows, head_dim)
  logits = jnp.einsum("BKGQH,BKSH->BKGQS", query, jnp.swapaxes(key, 1, 2), preferred_element_type=jnp.float32)
  return jax.nn.softmax(jnp.where(visible[:, None, None], logits * scale, -jnp.inf), axis=-1)


def sum_over_blocks(
  summand: Callable[..., Float[Array, "B *D"]], *by_row: Shaped[Array, "B Q *_"]
) -> Float[Array, "B *D"]:
  """The sum of `summand` over blocks of rows.

  Args:
    by_row: its arguments; zeros, or false, in the rows that fill the last block.
  """
  num_rows = by_row[0].shape[1]
  if num_rows <= BLOCK:
    return summand(*by_row)

  def blocks(x: Shaped[Array, "B Q *D"]) -> Shaped[Array, "n B R *D"]:
    padded = jnp.pad(x, [(0, 0), (0, -num_rows % BLOCK), *[(0, 0)] * (x.ndim - 2)])
    return jnp.moveaxis(padded.reshape(len(x), -1, BLOCK, *x.shape[2:]), 1, 0)

  own = tuple(map(blocks, by_row))
  total = jax.eval_shape(summand, *(x[0] for x in own))
  return jax.lax.scan(lambda total, block: (total + summand(*block), None), jnp.zeros(total.shape, total.dtype), own)[0]


def received_by_slots(
  query: Float[Array, "B Q N H"],
  key: Float[Array, "B S K H"],
  visible: Bool[Array, "B Q S"],
  valid: Bool[Array, "B Q"],
  scale: float,
) -> Float[Array, "B S"]:
  """Attention that all slots receive from the valid rows, summed over rows, averaged over heads."""

  def received(query: Array, visible: Array, valid: Array) -> Float[Array, "B K G S"]:
    attention = attention_of_rows(query, key, visible | ~valid[:, :, None], scale)
    return jnp.where(valid[:, None, None, :, None], attention, 0).sum(axis=3)

  by_head = sum_over_blocks(received, query, visible, valid)  # heads that are sharded are summed once, after all rows
  return by_head.sum(axis=(1, 2)) / query.shape[2]
