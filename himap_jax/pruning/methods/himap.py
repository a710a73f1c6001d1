"""HiMAP: instruction attention in shallow layers, image attention in deep ones; and its ablations (Tables 4 and 9)."""

from jaxtyping import Array, Float

from himap_jax.pruning.method import SEQUENCE, Method, View, highest


def instruction_attention(view: View) -> Float[Array, "B M"]:
  """Attention that each image token receives from all tokens after the image (Eq. 8)."""
  return view.attention_from(*view.layout.instruction_slots())


def image_attention(view: View) -> Float[Array, "B M"]:
  """Attention that each image token receives from the image tokens (Eq. 9)."""
  return view.attention_from(view.layout.image_slots(), view.layout.image_present())


INSTRUCTION = highest(instruction_attention, lambda sizes: sizes.attention(sizes.num_text_tokens))
IMAGE = highest(image_attention, lambda sizes: sizes.attention(sizes.num_present))
ABLATION = "arXiv 2503.13108, ablation"

METHODS = {
  "himap": Method("arXiv 2503.13108, question answering", (INSTRUCTION, IMAGE), (2, 8), (0.5, 0.125), needs=SEQUENCE),
  "himap_swapped": Method(ABLATION, (IMAGE, INSTRUCTION), (2, 8), (0.5, 0.125), needs=SEQUENCE),
  "instruction_attention": Method(ABLATION, (INSTRUCTION,), (2,), (0.5,)),
  "image_attention": Method(ABLATION, (IMAGE,), (8,), (0.25,), needs=SEQUENCE),
}
