"""The key-value cache of one segment of layers: static slots, and the positions of what they hold.

Axes: B batch, S query slots, T cache slots, K key heads, H head dim.
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
  """The cache of the layers between two pruning stages, which all hold the same tokens.

  Attributes:
    keys: rotated keys of each layer, `[B, K, T, H]`.
    values: values of each layer, `[B, K, T, H]`.
    positions: `[B, T]` rotary position of each slot's token, `UNUSED_POSITION` where there is none.
    num_slots_used: scalar, slots written so far; the same in every row, since shorter rows hold padding.
  """

  keys: tuple[Float[Array, "B K T H"], ...]
  values: tuple[Float[Array, "B K T H"], ...]
  positions: Int[Array, "B T"]
  num_slots_used: Int[Array, ""]

  def append_positions(self, positions: Int[Array, "B S"]) -> "SegmentCache":
    """Marks the next slots as holding tokens of the given positions."""
    updated = jax.lax.dynamic_update_slice_in_dim(self.positions, positions, self.num_slots_used, axis=1)
    return self.replace(positions=updated, num_slots_used=self.num_slots_used + positions.shape[1])

  def visible_to(self, positions: Int[Array, "B S"]) -> Bool[Array, "B 1 S T"]:
    """The mask of queries at the given positions: a slot is visible when its position is not later."""
    return (self.positions[:, None, :] <= positions[:, :, None])[:, None]


def from_prefill(
  keys: tuple[Float[Array, "B S K H"], ...],
  values: tuple[Float[Array, "B S K H"], ...],
  positions: Int[Array, "B S"],
  num_new_slots: int,
) -> SegmentCache:
  """A cache that holds a prefilled segment and has room for `num_new_slots` more tokens."""

  def grow(x: Float[Array, "B S K H"]) -> Float[Array, "B K T H"]:
    return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, num_new_slots), (0, 0)))

  return SegmentCache(
    keys=tuple(map(grow, keys)),
    values=tuple(map(grow, values)),
    positions=jnp.pad(positions, ((0, 0), (0, num_new_slots)), constant_values=UNUSED_POSITION),
    num_slots_used=jnp.int32(positions.shape[1]),
  )


def write_slot(
  cached: Float[Array, "B K T H"], new: Float[Array, "B 1 K H"], slot: Int[Array, ""]
) -> Float[Array, "B K T H"]:
  """A layer's keys or values with a new token's in a slot."""
  new = jnp.swapaxes(new, 1, 2)
  if cached.shape[0] == 1:
    return jax.lax.dynamic_update_slice_in_dim(cached, new, slot, axis=2)
  # As bits, since XLA on CPU converts a bfloat16 array of several rows as a whole to update a slice of it; of one row it
  # copies the bits.
  bits = jnp.dtype(f"uint{8 * cached.dtype.itemsize}")
  old, new = (jax.lax.bitcast_convert_type(x, bits) for x in (cached, new))
  return jax.lax.bitcast_convert_type(jax.lax.dynamic_update_slice_in_dim(old, new, slot, axis=2), cached.dtype)
