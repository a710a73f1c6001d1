"""HiMAP: what the instruction attends to in shallow layers, what the image attends to in deep ones."""

from jaxtyping import Array, Float

from himap_jax.method import Method, View, highest
from himap_jax.scoring import received_attention


def instruction_attention(view: View) -> Float[Array, "B M"]:
  """Attention that each image token receives from all tokens after the image (Eq. 8)."""
  rows, valid = view.layout.instruction_slots(view.x.shape[1])
  return received_attention(view.projections, view.layout, rows, valid)


def image_attention(view: View) -> Float[Array, "B M"]:
  """Attention that each image token receives from the image tokens (Eq. 9)."""
  return received_attention(view.projections, view.layout, view.layout.image_slots())


METHOD = Method(
  source="arXiv 2503.13108, question answering",
  selects=(highest(instruction_attention), highest(image_attention)),
  prune_layers=(2, 8),
  keep=(0.5, 0.125),
)
