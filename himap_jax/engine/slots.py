"""Slots of rows that are being decoded: prefilled rows enter free ones, and rows that have ended leave theirs.

Axes: B slots, P rows of a prefilled batch, M new tokens, n devices of the mesh axis `data`.

Slots and rows are sharded alike, and rows enter slots of their own device.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped, UInt

from himap_jax.engine.prefill import PrefillState
from himap_jax.engine.sampling import RowSampling
from himap_jax.inputs import UNUSED_ORDER, pytree
from himap_jax.model.cache import NewTokens, SegmentCache

MOST_ROOM = 2


@pytree
class Rows:
  """Settings of rows.

  Attributes:
    seeds: of their random keys.
    limits: the most tokens of their answers; 0 of rows that only fill a batch.
  """

  seeds: UInt[Array, "P"]
  limits: Int[Array, "P"]
  sampling: RowSampling


@pytree
class Slots:
  """The state of decoding.

  Attributes:
    caches: the prompts, one cache per segment that has layers.
    new: the tokens after them.
    rows: settings of the rows in the slots.
    last: `[B]` the newest token.
    position: `[B]` its rotary position.
    order: `[B]` its order, see `Layout.order`.
    num_tokens: `[B]` tokens of the answer so far.
    active: `[B]` whether a row that has not ended is in the slot.
  """

  caches: tuple[SegmentCache, ...]
  new: NewTokens
  rows: Rows
  last: Int[Array, "B"]
  position: Int[Array, "B"]
  order: Int[Array, "B"]
  num_tokens: Int[Array, "B"]
  active: Bool[Array, "B"]


class Entered(NamedTuple):
  """What became of prefilled rows.

  Attributes:
    first: `[P]` the first token of their answers.
    place: `[P]` the slot, among those of the row's device; −1 if the row ended with its first token.
  """

  first: Int[Array, "P"]
  place: Int[Array, "P"]


def shapes(prompts: PrefillState, num_slots: int, num_new: int, dtype: Any) -> Slots:
  """The shapes of slots for prompts of these shapes.

  Args:
    num_new: M, the most tokens after a prompt that are read again.
    dtype: of the new tokens' keys and values.
  """

  def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((num_slots, *shape), dtype)

  caches = jax.tree.map(lambda x: array(x.dtype, *x.shape[1:]), prompts.caches)
  new = tuple(array(dtype, key.shape[1], num_new, key.shape[3]) for cache in prompts.caches for key in cache.keys)
  integers = array(jnp.int32)
  return Slots(
    caches=caches,
    new=NewTokens(new, new, array(jnp.int32, num_new), jax.ShapeDtypeStruct((), jnp.int32)),
    rows=Rows(array(jnp.uint32), integers, RowSampling(*[array(jnp.float32)] * 2)),
    last=integers,
    position=integers,
    order=integers,
    num_tokens=integers,
    active=array(bool),
  )


def hold(slots: Slots, prompts: PrefillState) -> bool:
  """Whether slots of these shapes hold prompts of these shapes, and no more than `MOST_ROOM` times as much."""
  own, given = (jax.tree.flatten(tree.caches) for tree in (slots, prompts))
  if own[1] != given[1]:
    return False
  rooms, sizes = ([x.shape[1:] for x in leaves] for leaves, _ in (own, given))
  is_enough = all(
    size <= room and (size == 0) == (room == 0)
    for shapes in zip(sizes, rooms, strict=True)
    for size, room in zip(*shapes, strict=True)
  )
  return is_enough and sum(map(math.prod, rooms)) <= MOST_ROOM * sum(map(math.prod, sizes))


def put(
  slots: Slots, prompts: PrefillState, rows: Rows, starts: tuple[Array, Array], num_shards: int
) -> tuple[Slots, Entered]:
  """Puts prefilled rows into free slots, of which every device must have enough.

  Args:
    starts: the rows' first tokens, and whether their answers end with these.
    num_shards: n.
  """
  first, ends = starts
  stays = ~ends & (rows.limits > 1)
  place = _free_places(*(x.reshape(num_shards, -1) for x in (slots.active, stays)))

  write = functools.partial(_write, place)

  def overwrite(old: Shaped[Array, "B *D"], value: int) -> Shaped[Array, "B *D"]:
    return write(old, jnp.full((len(first), *old.shape[1:]), value, old.dtype))

  # Of keys and values that are not read, NaN would still reach the products of attention: they are zero.
  blank = functools.partial(overwrite, value=0)
  new = slots.new.replace(
    keys=jax.tree.map(blank, slots.new.keys),
    values=jax.tree.map(blank, slots.new.values),
    order=overwrite(slots.new.order, UNUSED_ORDER),
  )
  entered = slots.replace(
    caches=jax.tree.map(write, slots.caches, prompts.caches),
    new=new,
    rows=jax.tree.map(write, slots.rows, rows),
    last=write(slots.last, first),
    position=write(slots.position, prompts.next_position),
    order=write(slots.order, prompts.next_order),
    num_tokens=write(slots.num_tokens, jnp.ones_like(first)),
    active=write(slots.active, stays),
  )
  num_places = slots.active.shape[0] // num_shards
  return entered, Entered(first, jnp.where(place < num_places, place, -1).reshape(-1))


@jax.jit  # traced once for all arrays of a shape
def _write(place: Int[Array, "n p"], old: Shaped[Array, "B *D"], new: Shaped[Array, "P *d"]) -> Shaped[Array, "B *D"]:
  """Writes rows to their places among those of their device."""
  num_shards = len(place)
  room = [(0, 0), *((0, x - y) for x, y in zip(old.shape[1:], new.shape[1:], strict=True))]
  new = jnp.pad(new, room, constant_values=UNUSED_ORDER if new.dtype == jnp.int32 else 0)  # of integers only orders
  sharded = (x.reshape(num_shards, len(x) // num_shards, *x.shape[1:]) for x in (old, new))
  written = jax.vmap(lambda old, new, at: old.at[at].set(new, mode="drop", unique_indices=True))(*sharded, place)
  return written.reshape(old.shape)


def _free_places(active: Bool[Array, "n b"], stays: Bool[Array, "n p"]) -> Int[Array, "n p"]:
  """A free slot of the device for each row that stays, in order; for the others an index beyond the last slot."""
  free = jnp.argsort(active, axis=1, stable=True).astype(jnp.int32)
  rank = jnp.cumsum(stays, axis=1, dtype=jnp.int32) - 1
  place = jnp.take_along_axis(free, jnp.clip(rank, 0, active.shape[1] - 1), axis=1)
  beyond = active.shape[1] + jnp.arange(stays.shape[1], dtype=jnp.int32)[None]
  return jnp.where(stays, place, beyond)
