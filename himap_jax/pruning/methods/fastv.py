"""FastV: attention of the last token."""

from jaxtyping import Array, Float

from himap_jax.pruning.method import Method, View, highest


def last_token_attention(view: View) -> Float[Array, "B M"]:
  """Attention that each image token receives from the prompt's last token in the previous layer."""
  return view.attention_from(view.layout.last_slot()[:, None])


CRITERION = highest(last_token_attention, lambda sizes: sizes.attention(1))
METHODS = {"fastv": Method("arXiv 2403.06764, K = 2, R = 50%", (CRITERION,), prune_layers=(2,), keep=(0.5,))}
