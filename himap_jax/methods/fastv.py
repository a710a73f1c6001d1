"""FastV: what the last token attends to."""

from jaxtyping import Array, Float

from himap_jax.method import Method, View, highest
from himap_jax.scoring import received_attention


def last_token_attention(view: View) -> Float[Array, "B M"]:
  """Attention that each image token receives from the prompt's last token in the layer before."""
  return received_attention(view.projections, view.layout, (view.layout.length - 1)[:, None])


METHOD = Method(
  source="arXiv 2403.06764, K = 2, R = 50%", selects=(highest(last_token_attention),), prune_layers=(2,), keep=(0.5,)
)
