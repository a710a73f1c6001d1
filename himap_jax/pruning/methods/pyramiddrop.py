"""PyramidDrop: attention of the last token in the next layer, at several stages."""

from jaxtyping import Array, Float

from himap_jax.pruning.method import Method, View, highest
from himap_jax.pruning.sizes import Sizes


def next_layer_attention(view: View) -> Float[Array, "B M"]:
  """Attention that each image token would receive from the last token in the next layer."""
  return view.attention_in_next_layer(view.layout.last_slot()[:, None])


def cost(sizes: Sizes) -> int:
  """Queries and attention of one row, and keys of the whole sequence."""
  model = sizes.model
  return sizes.attention(1) + model.hidden_size * (model.query_width + sizes.num_slots * model.key_width)


CRITERION = highest(next_layer_attention, cost)
LAYERS, KEEP = (8, 16, 24), (0.5, 0.25, 0.125)
METHODS = {"pyramiddrop": Method("arXiv 2410.17247", (CRITERION,), LAYERS, KEEP, reads_next_layer=True)}
