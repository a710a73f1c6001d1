"""FasterVLM: attention of the vision tower's class token."""

from jaxtyping import Array, Float

from himap_jax.inputs import take_slots
from himap_jax.pruning.method import Method, View, highest


def class_attention(view: View) -> Float[Array, "B M"]:
  """Attention of the class token to each image token in the tower's feature layer."""
  return take_slots(view.class_attention, view.layout.original())


SOURCE = "arXiv 2412.01818, 75% fewer tokens"
CRITERION = highest(class_attention, lambda sizes: sizes.class_attention())
METHODS = {
  "fastervlm": Method(SOURCE, (CRITERION,), (0,), (0.25,), acts="before", needs=frozenset({"class_attention"}))
}
