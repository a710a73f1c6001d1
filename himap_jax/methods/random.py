"""Random tokens: the control that a method has to beat. A row's choice depends on its seed and id alone."""

import jax
from jaxtyping import Array, Float

from himap_jax.method import Method, View, highest


def noise(view: View) -> Float[Array, "B M"]:
  """Independent uniform numbers."""
  num_tokens = view.layout.num_image_tokens
  return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, view.layer), (num_tokens,)))(view.keys)


METHOD = Method(
  source="control", criteria=(highest(noise, lambda sizes: 0),), acts="anywhere", prune_layers=(0,), keep=(0.25,)
)
