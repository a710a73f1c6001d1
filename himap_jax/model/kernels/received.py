"""Attention that slots receive from some rows, in one Pallas kernel: no row's attention leaves a core's own memory.

Axes: B batch, Q rows, T slots, N query heads, K key heads, H head dim, n blocks of rows.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float

from himap_jax.inputs import pad_to
from himap_jax.model.kernels import HIDDEN

ROWS, SLOTS = 64, 128  # of a block


def received(
  query: Float[Array, "B Q N H"],
  key: Float[Array, "B T K H"],
  visible: Bool[Array, "B Q T"],
  valid: Bool[Array, "B Q"],
  scale: float,
  **options: Any,
) -> Float[Array, "B T"]:
  """Attention that slots receive from the valid rows, summed over rows and heads, on one device.

  Every program of the grid takes a block of rows of one head, and goes over the slots twice: for the maximum and the
  sum of the row's weights, and for what the slots receive.

  Args:
    options: of `pallas_call`.
  """
  batch, _, num_heads, head_dim = query.shape
  num_slots, group = key.shape[1], num_heads // key.shape[2]
  query = pad_to(jnp.swapaxes(query, 1, 2), {2: ROWS})
  key = pad_to(jnp.swapaxes(key, 1, 2), {2: SLOTS})
  visible = pad_to(visible.astype(jnp.int32), {1: ROWS, 2: SLOTS})
  weight = pad_to(valid.astype(jnp.float32)[:, :, None], {1: ROWS})
  padded, num_blocks = key.shape[2], query.shape[2] // ROWS
  by_block = pl.pallas_call(
    functools.partial(_block, scale=scale),
    grid=(batch, num_heads, num_blocks),
    in_specs=[
      pl.BlockSpec((None, None, ROWS, head_dim), lambda b, head, rows: (b, head, rows, 0)),
      pl.BlockSpec((None, None, padded, head_dim), lambda b, head, rows: (b, jax.lax.div(head, group), 0, 0)),
      pl.BlockSpec((None, ROWS, padded), lambda b, head, rows: (b, rows, 0)),
      pl.BlockSpec((None, ROWS, 1), lambda b, head, rows: (b, rows, 0)),
    ],
    out_specs=pl.BlockSpec((None, None, None, 1, padded), lambda b, head, rows: (b, head, rows, 0, 0)),
    out_shape=jax.ShapeDtypeStruct((batch, num_heads, num_blocks, 1, padded), jnp.float32),
    name="received_attention",
    **options,
  )(query, key, visible, weight)
  return by_block.sum(axis=(1, 2, 3))[:, :num_slots]


def _block(query_ref: Any, key_ref: Any, visible_ref: Any, weight_ref: Any, received_ref: Any, *, scale: float) -> None:
  query = query_ref[...]

  def logits(slots: slice) -> Float[Array, "R T"]:
    products = jax.lax.dot_general(
      query, key_ref[slots, :], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    return jnp.where(visible_ref[:, slots] != 0, products * scale, HIDDEN)

  blocks = [slice(first, first + SLOTS) for first in range(0, key_ref.shape[0], SLOTS)]
  highest = jnp.full((ROWS, 1), HIDDEN, jnp.float32)
  total = jnp.zeros((ROWS, 1), jnp.float32)
  for slots in blocks:
    own = logits(slots)
    before, highest = highest, jnp.maximum(highest, own.max(axis=1, keepdims=True))
    total = total * jnp.exp(before - highest) + jnp.exp(own - highest).sum(axis=1, keepdims=True)
  share = weight_ref[...] / total
  for slots in blocks:
    received_ref[:, slots] = (jnp.exp(logits(slots) - highest) * share).sum(axis=0, keepdims=True)
