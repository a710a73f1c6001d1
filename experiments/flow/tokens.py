"""Which slots are of the system prompt, of the image and of the instruction, and the blocks of attention between them.

Axes: B batch, S slots.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool

from himap_jax.layout import Layout

KINDS = ("system", "image", "instruction")

# Name → (kind of the query, kind of the key): information flows from the key to the query.
BLOCKS = {
  "image→instruction": ("instruction", "image"),
  "image→image": ("image", "image"),
  "instruction→instruction": ("instruction", "instruction"),
  "system→instruction": ("instruction", "system"),
  "system→image": ("image", "system"),
  "system→system": ("system", "system"),
}


def kinds(layout: Layout, num_slots: int) -> dict[str, Bool[Array, "B S"]]:
  """Where the tokens of each kind are: text before the image, the image, and all after it; padding is none."""
  slot = jnp.arange(num_slots, dtype=jnp.int32)[None]
  start, end = layout.image_start[:, None], (layout.image_start + layout.num_image_tokens)[:, None]
  return {
    "system": slot < start,
    "image": (slot >= start) & (slot < end),
    "instruction": (slot >= end) & (slot < layout.length[:, None]),
  }


def block(layout: Layout, num_slots: int, name: str) -> Bool[Array, "B S S"]:
  """The pairs (query, key) of a block between which causality lets information flow: of different tokens."""
  query, key = (kinds(layout, num_slots)[kind] for kind in BLOCKS[name])
  return query[:, :, None] & key[:, None] & earlier(num_slots)


def all_pairs(layout: Layout, num_slots: int) -> Bool[Array, "B S S"]:
  """The pairs of all blocks, and of those that have no name."""
  is_token = jnp.arange(num_slots, dtype=jnp.int32)[None] < layout.length[:, None]
  return is_token[:, :, None] & is_token[:, None] & earlier(num_slots)


def earlier(num_slots: int) -> Bool[Array, "1 S S"]:
  """The pairs (query, key) whose key comes before the query."""
  return jnp.tril(jnp.ones((num_slots, num_slots), bool), k=-1)[None]
