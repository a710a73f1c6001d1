"""SparseVLM: what the text tokens that the image speaks to attend to.

Its recycling of dropped tokens by clustering (first version) is left out, as in its authors' second version.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from himap_jax.method import Method, Sizes, View, highest


def raters(view: View) -> Bool[Array, "B T"]:
  """Which instruction tokens rate: of softmax over text of image · text, averaged over the image, those above the mean.

  Where no token is above the mean, all of them rate.
  """
  layout, x = view.embedded_layout, view.embeddings.astype(jnp.float32)
  slots, valid = layout.instruction_slots(x.shape[1])
  image, text = (jnp.take_along_axis(x, rows[:, :, None], axis=1) for rows in (layout.image_slots(), slots))
  products = jnp.einsum("BND,BTD->BNT", image, text, precision="highest")
  shares = jax.nn.softmax(jnp.where(valid[:, None], products, -jnp.inf), axis=-1).mean(axis=1)
  rating = valid & (shares > 1.0 / valid.sum(axis=1, keepdims=True, dtype=jnp.float32))
  return jnp.where(rating.any(axis=1, keepdims=True), rating, valid)


def rated_attention(view: View) -> Float[Array, "B M"]:
  """Attention that each image token receives from the raters in the layer before."""
  rows, _ = view.layout.instruction_slots(view.x.shape[1])
  return view.attention_from(rows, raters(view))


def cost(sizes: Sizes) -> int:
  """Products of all image and text embeddings, and attention from as many rows as there may be raters."""
  products = sizes.num_image_tokens * sizes.num_text_tokens * sizes.config.text.hidden_size
  return products + sizes.attention(sizes.num_text_tokens)


METHOD = Method(
  source="arXiv 2410.04417, 192 tokens on average",
  criteria=(highest(rated_attention, cost),),
  prune_layers=(2, 6, 15),
  keep=(300 / 576, 200 / 576, 110 / 576),
)
