"""Token kinds (system prompt, image, instruction) and the attention blocks between them.

Axes: B batch, S slots.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool

from himap_jax.inputs import IMAGE, PADDING, TEXT, Layout
from himap_jax.model.config import TextConfig
from himap_jax.model.cross_attention import CrossLayout

KINDS = ("system", "image", "instruction")

# Name → (kind of the query, kind of the key): information flows from the key to the query. These are the paper's. Pairs
# of other kinds are in no block: text between pictures, and a system prompt that reads the image by cross-attention.
BLOCKS = {
  "image→instruction": ("instruction", "image"),
  "image→image": ("image", "image"),
  "instruction→instruction": ("instruction", "instruction"),
  "system→instruction": ("instruction", "system"),
  "system→image": ("image", "system"),
  "system→system": ("system", "system"),
}


def kinds(layout: Layout) -> dict[str, Bool[Array, "B S"]]:
  """The slots of each kind: text before the first image token, image tokens, and text after the last."""
  text, image = layout.kind == TEXT, layout.kind == IMAGE
  images_so_far = image.cumsum(axis=1)
  return {
    "system": text & (images_so_far == 0),
    "image": image,
    "instruction": text & (images_so_far == images_so_far[:, -1:]) & image.any(axis=1, keepdims=True),
  }


def block(layout: Layout, name: str) -> Bool[Array, "B S S"]:
  """The pairs (query, key) of a block in which the query sees the key."""
  query, key = (kinds(layout)[kind] for kind in BLOCKS[name])
  return query[:, :, None] & key[:, None] & visible(layout)


def layers_of(text: TextConfig, name: str) -> tuple[int, ...]:
  """The layers whose attention carries information in a block: with cross-attention some or none, otherwise all."""
  query, key = BLOCKS[name]
  every, cross = tuple(range(text.num_hidden_layers)), text.cross_attention_layers
  if not cross:
    return every
  if query == "image":
    return ()
  return tuple(layer for layer in every if (layer in cross) == (key == "image"))


def visible(layout: Layout) -> Bool[Array, "B S S"]:
  """All pairs (query, key) of two tokens in which the query sees the key: mostly those with the key before the query.

  Where the text reads image tokens by cross-attention, it sees earlier text in self layers, and in cross layers the
  image tokens to which it attends. Text before all pictures attends to all of them there: information flows, although
  no block holds these pairs.
  """
  if isinstance(layout, CrossLayout):
    is_text = layout.kind == TEXT
    earlier = is_text[:, None] & (layout.order[:, None] < layout.order[:, :, None])
    every_slot = jnp.broadcast_to(jnp.arange(layout.num_slots, dtype=jnp.int32), layout.kind.shape)
    return is_text[:, :, None] & (earlier | layout.visible(every_slot))
  order = layout.order
  pairs = layout.visible() & (order[:, None] != order[:, :, None])
  return pairs & (layout.kind != PADDING)[:, :, None]
