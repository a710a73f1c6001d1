"""Key-value caches of static shape: what prefill left of the prompts, and room for the new tokens.

Axes: B batch, S query slots, T cache slots, M slots for new tokens, K key heads, H head dim.

A prompt's part never changes after prefill, so each array lies as a decoding step reads it fastest.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from himap_jax.inputs import UNUSED_ORDER, pytree


@pytree
class SegmentCache:
  """The prompts in the layers between two pruning stages, which all hold the same tokens.

  Attributes:
    keys: rotated keys of each layer, `[B, K, T, H]`.
    values: values of each layer, `[B, K, H, T]`.
    order: `[B, T]` of each slot's token, see `Layout.order`.
  """

  keys: tuple[Float[Array, "B K T H"], ...]
  values: tuple[Float[Array, "B K H T"], ...]
  order: Int[Array, "B T"]


@pytree
class NewTokens:
  """The tokens that follow the prompts, in all layers.

  Attributes:
    keys: rotated keys of each layer, `[B, K, M, H]`.
    values: values of each layer, `[B, K, M, H]`.
    order: `[B, M]` as in `SegmentCache`.
    num_slots_used: scalar, slots written so far; the same in every row.
  """

  keys: tuple[Float[Array, "B K M H"], ...]
  values: tuple[Float[Array, "B K M H"], ...]
  order: Int[Array, "B M"]
  num_slots_used: Int[Array, ""]

  def append_order(self, order: Int[Array, "B"]) -> "NewTokens":
    """Marks the next slot as holding tokens of the given order."""
    updated = jax.lax.dynamic_update_slice_in_dim(self.order, order[:, None], self.num_slots_used, axis=1)
    return self.replace(order=updated, num_slots_used=self.num_slots_used + 1)


def from_prefill(
  keys: tuple[Float[Array, "B S K H"], ...], values: tuple[Float[Array, "B S K H"], ...], order: Int[Array, "B S"]
) -> SegmentCache:
  """The cache of a prefilled segment."""
  return SegmentCache(
    keys=tuple(jnp.swapaxes(key, 1, 2) for key in keys),
    values=tuple(jnp.transpose(value, (0, 2, 3, 1)) for value in values),
    order=order,
  )


def empty(caches: tuple[SegmentCache, ...], num_slots: int, dtype: Any) -> NewTokens:
  """Room for new tokens behind prompts."""
  shapes = [(*key.shape[:2], num_slots, key.shape[3]) for cache in caches for key in cache.keys]
  return NewTokens(
    keys=tuple(jnp.zeros(shape, dtype) for shape in shapes),
    values=tuple(jnp.zeros(shape, dtype) for shape in shapes),
    order=jnp.full((shapes[0][0], num_slots), UNUSED_ORDER, jnp.int32),
    num_slots_used=jnp.int32(0),
  )


def visible(cached: Int[Array, "B T"], order: Int[Array, "B"]) -> Bool[Array, "B 1 1 T"]:
  """The mask of one query a row: it sees the slots whose order is not later than its own."""
  return (cached <= order[:, None])[:, None, None]


def write_slot(
  cached: Float[Array, "B K M H"], new: Float[Array, "B 1 K H"], slot: Int[Array, ""]
) -> Float[Array, "B K M H"]:
  """A layer's keys or values with a new token's in a slot."""
  return jax.lax.dynamic_update_slice_in_dim(cached, jnp.swapaxes(new, 1, 2).astype(cached.dtype), slot, axis=2)
