"""FasterVLM: what the vision tower's class token attends to."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from himap_jax.method import Method, View, highest


def class_attention(view: View) -> Float[Array, "B M"]:
  """Attention of the class token to each image token in the tower's feature layer."""
  return jnp.take_along_axis(view.tower.class_attention, view.original, axis=1)


METHOD = Method(
  source="arXiv 2412.01818, 75% fewer tokens",
  criteria=(highest(class_attention, lambda sizes: sizes.class_attention()),),
  acts="before",
  prune_layers=(0,),
  keep=(0.25,),
  needs_class_attention=True,
)
