"""Token kinds (system prompt, image, instruction) and the attention blocks between them.

Axes: B batch, S slots.
"""

from jaxtyping import Array, Bool

from himap_jax.inputs import IMAGE, PADDING, TEXT, Layout

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


def visible(layout: Layout) -> Bool[Array, "B S S"]:
  """All pairs (query, key) of two tokens in which the query sees the key: mostly those with the key before the query."""
  order = layout.order
  pairs = layout.visible() & (order[:, None] != order[:, :, None])
  return pairs & (layout.kind != PADDING)[:, :, None]
