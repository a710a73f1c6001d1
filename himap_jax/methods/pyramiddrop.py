"""PyramidDrop: what the last token would attend to in the layer that comes next, several times over."""

from jaxtyping import Array, Float

from himap_jax.method import Method, View, highest
from himap_jax.scoring import received_attention


def next_layer_attention(view: View) -> Float[Array, "B M"]:
  """Attention that each image token would receive from the last token, by the next layer's queries and keys."""
  return received_attention(view.next_projections(), view.layout, (view.layout.length - 1)[:, None])


METHOD = Method(
  source="arXiv 2410.17247",
  selects=(highest(next_layer_attention),),
  prune_layers=(8, 16, 24),
  keep=(0.5, 0.25, 0.125),
)
