"""PyramidDrop: what the last token would attend to in the layer that comes next, several times over."""

from jaxtyping import Array, Float

from himap_jax.method import Method, Sizes, View, highest
from himap_jax.scoring import received_attention


def next_layer_attention(view: View) -> Float[Array, "B M"]:
  """Attention that each image token would receive from the last token, by the next layer's queries and keys."""
  last = (view.layout.length - 1)[:, None]
  projections = view.next_projections(last)
  return received_attention(projections.query, projections.key, view.layout, last)


def cost(sizes: Sizes) -> int:
  """One row of queries and attention, and the keys of the whole sequence."""
  text = sizes.config.text
  queries, keys = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
  return sizes.attention(1) + text.hidden_size * (queries + sizes.num_slots * keys)


METHOD = Method(
  source="arXiv 2410.17247",
  criteria=(highest(next_layer_attention, cost),),
  prune_layers=(8, 16, 24),
  keep=(0.5, 0.25, 0.125),
)
