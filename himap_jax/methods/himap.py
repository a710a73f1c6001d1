"""HiMAP: what the instruction attends to in shallow layers, what the image attends to in deep ones."""

from jaxtyping import Array, Float

from himap_jax.method import Method, View, highest


def instruction_attention(view: View) -> Float[Array, "B M"]:
  """Attention that each image token receives from all tokens after the image (Eq. 8)."""
  rows, valid = view.layout.instruction_slots(view.x.shape[1])
  return view.attention_from(rows, valid)


def image_attention(view: View) -> Float[Array, "B M"]:
  """Attention that each image token receives from the image tokens (Eq. 9)."""
  return view.attention_from(view.layout.image_slots())


METHOD = Method(
  source="arXiv 2503.13108, question answering",
  criteria=(
    highest(instruction_attention, lambda sizes: sizes.attention(sizes.num_text_tokens)),
    highest(image_attention, lambda sizes: sizes.attention(sizes.num_present)),
  ),
  prune_layers=(2, 8),
  keep=(0.5, 0.125),
)
