"""Key-value caches of static shape: the prefilled prompts, and a ring of slots for new tokens.

Axes: B batch, S query slots, T cache slots, M slots for new tokens, K key heads, H head dim.

A prompt's part never changes after prefill, so each array has the layout that a decoding step reads fastest.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from himap_jax import inputs
from himap_jax.inputs import UNUSED_ORDER, pad_to, pytree


@pytree
class ImageMask:
  """Which image tokens the queries of a cross layer see.

  Attributes:
    visible: `[B, 1, Q, M]`.
    reads: `[B, Q, 1]` whether the query reads a picture; one that reads none sees all, for its attention alone.
  """

  visible: Bool[Array, "B 1 Q M"]
  reads: Bool[Array, "B Q 1"]


@pytree
class SegmentCache:
  """The KV cache of the prompts in the layers between two pruning stages, which all see the same tokens.

  Attributes:
    keys: rotated keys of each layer, `[B, K, T, H]`.
    values: values of each layer, `[B, K, H, T]`.
    order: `[B, T]`, see `Layout.order`.
    images: of a decoder with cross layers, whose keys and values are those of image tokens, what new tokens see there.
    log_count: `[B, T]` what logits of the first layer gain, see `Calibration`; None without calibration.
  """

  keys: tuple[Float[Array, "B K T H"], ...]
  values: tuple[Float[Array, "B K H T"], ...]
  order: Int[Array, "B T"]
  images: ImageMask | None = None
  log_count: Float[Array, "B T"] | None = None


@pytree
class NewTokens:
  """The KV cache of the tokens after the prompts, in all layers.

  Attributes:
    keys: rotated keys of each layer, `[B, K, M, H]`.
    values: values of each layer, `[B, K, M, H]`.
    num_written: scalar, slots written so far, round and round; the same in every row. A row reads those of its own
      tokens, by their order.
  """

  keys: tuple[Float[Array, "B K M H"], ...]
  values: tuple[Float[Array, "B K M H"], ...]
  order: Int[Array, "B M"]
  num_written: Int[Array, ""]

  def append_order(self, order: Int[Array, "B"]) -> tuple["NewTokens", Int[Array, ""]]:
    """Assigns the next slot to tokens of the given order, and returns it."""
    slot = self.num_written % self.order.shape[1]
    updated = jax.lax.dynamic_update_slice_in_dim(self.order, order[:, None], slot, axis=1)
    return self.replace(order=updated, num_written=self.num_written + 1), slot


def from_prefill(
  keys: tuple[Float[Array, "B _ K H"], ...], values: tuple[Float[Array, "B _ K H"], ...], order: Int[Array, "B S"]
) -> SegmentCache:
  """The cache of a prefilled segment."""
  return SegmentCache(
    keys=tuple(jnp.swapaxes(key, 1, 2) for key in keys),
    values=tuple(jnp.transpose(value, (0, 2, 3, 1)) for value in values),
    order=order,
  )


def padded(cache: SegmentCache, multiple: int) -> SegmentCache:
  """The cache with its slots padded to a multiple; no query sees the others."""
  images = cache.images and cache.images.replace(visible=pad_to(cache.images.visible, {3: multiple}))
  return cache.replace(
    keys=tuple(pad_to(key, {2: multiple}) for key in cache.keys),
    values=tuple(pad_to(value, {3: multiple}) for value in cache.values),
    order=pad_to(cache.order, {1: multiple}, fill=UNUSED_ORDER),
    images=images,
    log_count=None if cache.log_count is None else pad_to(cache.log_count, {1: multiple}),
  )


def empty(caches: tuple[SegmentCache, ...], num_slots: int, dtype: Any) -> NewTokens:
  """An empty cache for the tokens after prompts."""
  shapes = [(*key.shape[:2], num_slots, key.shape[3]) for cache in caches for key in cache.keys]
  return NewTokens(
    keys=tuple(jnp.zeros(shape, dtype) for shape in shapes),
    values=tuple(jnp.zeros(shape, dtype) for shape in shapes),
    order=jnp.full((shapes[0][0], num_slots), UNUSED_ORDER, jnp.int32),
    num_written=jnp.int32(0),
  )


def visible(cached: Int[Array, "B T"], order: Int[Array, "B"], window: int | None) -> Bool[Array, "B 1 1 T"]:
  """Mask of one query per row; see `inputs.visible`."""
  return inputs.visible(cached, order[:, None], window)[:, None]


def write_slot(
  cached: Float[Array, "B K M H"], new: Float[Array, "B 1 K H"], slot: Int[Array, ""]
) -> Float[Array, "B K M H"]:
  """Writes a new token's keys or values into a slot."""
  return jax.lax.dynamic_update_slice_in_dim(cached, jnp.swapaxes(new, 1, 2).astype(cached.dtype), slot, axis=2)
