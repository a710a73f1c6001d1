"""SparseVLM: attention from the text tokens that resemble the image.

Recycling of dropped tokens by clustering (first version) is left out, as in the authors' second version.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from himap_jax.inputs import take_slots
from himap_jax.pruning.method import SEQUENCE, Method, View, highest
from himap_jax.pruning.sizes import Sizes


def raters(view: View) -> Bool[Array, "B T"]:
  """Mask of the instruction tokens with more than the mean share of the image, or all if no share is above the mean.

  Shares are the softmax over text of image · text, averaged over image tokens.
  """
  layout, x = view.embedded_layout, view.embeddings.astype(jnp.float32)
  slots, valid = layout.instruction_slots()
  image, text = take_slots(x, layout.image_slots()), take_slots(x, slots)
  products = jnp.einsum("BND,BTD->BNT", image, text, precision="highest")
  present = layout.image_present()
  shares = jnp.where(present[:, :, None], jax.nn.softmax(jnp.where(valid[:, None], products, -jnp.inf), axis=-1), 0.0)
  shares = shares.mean(axis=1) * (present.shape[1] / present.sum(axis=1, keepdims=True, dtype=jnp.float32))
  rating = valid & (shares > 1.0 / valid.sum(axis=1, keepdims=True, dtype=jnp.float32))
  return jnp.where(rating.any(axis=1, keepdims=True), rating, valid)


def rated_attention(view: View) -> Float[Array, "B M"]:
  """Attention that each image token receives from the raters in the previous layer."""
  rows, _ = view.layout.instruction_slots()
  return view.attention_from(rows, raters(view))


def cost(sizes: Sizes) -> int:
  """Products of all image and text embeddings, and attention from every text token."""
  products = sizes.num_image_tokens * sizes.num_text_tokens * sizes.model.hidden_size
  return products + sizes.attention(sizes.num_text_tokens)


SOURCE = "arXiv 2410.04417, 192 tokens on average"
KEEP = (300 / 576, 200 / 576, 110 / 576)
CRITERION = highest(rated_attention, cost)
METHODS = {"sparsevlm": Method(SOURCE, (CRITERION,), prune_layers=(2, 6, 15), keep=KEEP, needs=SEQUENCE)}
