"""Key-value caches of static shape: what prefill left of the prompts, and room for the new tokens.

Axes: B batch, S query slots, T cache slots, M slots for new tokens, K key heads, H head dim.

A prompt's part never changes after prefill, so each array lies as a decoding step reads it fastest.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

# The position of padding and of slots that nothing was written to: later than any query, hence never visible.
UNUSED_POSITION = np.iinfo(np.int32).max


@flax.struct.dataclass
class SegmentCache:
  """The prompts in the layers between two pruning stages, which all hold the same tokens.

  Attributes:
    keys: rotated keys of each layer, `[B, K, T, H]`.
    values: values of each layer, `[B, K, H, T]`.
    positions: `[B, T]` rotary position of each slot's token, `UNUSED_POSITION` where there is none.
  """

  keys: tuple[Float[Array, "B K T H"], ...]
  values: tuple[Float[Array, "B K H T"], ...]
  positions: Int[Array, "B T"]


@flax.struct.dataclass
class NewTokens:
  """The tokens that follow the prompts, in all layers; in float32, which XLA on CPU writes in its place and reads faster.

  Attributes:
    keys: rotated keys of each layer, `[B, K, M, H]`.
    values: values of each layer, `[B, K, M, H]`.
    positions: `[B, M]` as in `SegmentCache`.
    num_slots_used: scalar, slots written so far; the same in every row.
  """

  keys: tuple[Float[Array, "B K M H"], ...]
  values: tuple[Float[Array, "B K M H"], ...]
  positions: Int[Array, "B M"]
  num_slots_used: Int[Array, ""]

  def append_positions(self, positions: Int[Array, "B 1"]) -> "NewTokens":
    """Marks the next slot as holding tokens of the given positions."""
    updated = jax.lax.dynamic_update_slice_in_dim(self.positions, positions, self.num_slots_used, axis=1)
    return self.replace(positions=updated, num_slots_used=self.num_slots_used + 1)


def from_prefill(
  keys: tuple[Float[Array, "B S K H"], ...], values: tuple[Float[Array, "B S K H"], ...], positions: Int[Array, "B S"]
) -> SegmentCache:
  """The cache of a prefilled segment."""
  return SegmentCache(
    keys=tuple(jnp.swapaxes(key, 1, 2) for key in keys),
    values=tuple(jnp.transpose(value, (0, 2, 3, 1)) for value in values),
    positions=positions,
  )


def empty(caches: tuple[SegmentCache, ...], num_slots: int) -> NewTokens:
  """Room for new tokens behind prompts."""
  shapes = [(*key.shape[:2], num_slots, key.shape[3]) for cache in caches for key in cache.keys]
  return NewTokens(
    keys=tuple(jnp.zeros(shape, jnp.float32) for shape in shapes),
    values=tuple(jnp.zeros(shape, jnp.float32) for shape in shapes),
    positions=jnp.full((shapes[0][0], num_slots), UNUSED_POSITION, jnp.int32),
    num_slots_used=jnp.int32(0),
  )


def visible(cached: Int[Array, "B T"], positions: Int[Array, "B S"]) -> Bool[Array, "B 1 S T"]:
  """The mask of queries at the given positions: a slot is visible when its position is not later."""
  return (cached[:, None, :] <= positions[:, :, None])[:, None]


def write_slot(
  cached: Float[Array, "B K M H"], new: Float[Array, "B 1 K H"], slot: Int[Array, ""]
) -> Float[Array, "B K M H"]:
  """A layer's keys or values with a new token's in a slot."""
  return jax.lax.dynamic_update_slice_in_dim(cached, jnp.swapaxes(new, 1, 2).astype(cached.dtype), slot, axis=2)
