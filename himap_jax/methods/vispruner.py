"""VisPruner: half by the class token's attention, half what is left when the most similar tokens are removed."""

import jax.numpy as jnp

from himap_jax.method import Criterion, Method, Selection, Sizes, View, cosine_similarity

IMPORTANT_SHARE = 0.5
REMOVED_AT_ONCE = 8


def important_and_diverse(view: View, keep: int) -> Selection:
  """The highest class attention; of the rest, in that order, tokens are removed while a partner resembles them most.

  Partners are the tokens at even and at odd places; of the even ones, the eight that most resemble an odd one go.
  """
  num_important = int(keep * IMPORTANT_SHARE)
  order = jnp.argsort(-view.tower.class_attention, axis=1, stable=True)
  important, residual = order[:, :num_important], order[:, num_important:]
  num_diverse = keep - num_important
  while (size := residual.shape[1]) > num_diverse:
    even, odd = residual[:, ::2], residual[:, 1::2]
    similarity = cosine_similarity(
      *(jnp.take_along_axis(view.tower.features, x[:, :, None], axis=1) for x in (even, odd))
    )
    likeness = similarity.max(axis=2, initial=-1.0)
    survivors = jnp.argsort(-likeness, axis=1, stable=True)[:, min(REMOVED_AT_ONCE, size - num_diverse) :]
    residual = jnp.concatenate([jnp.take_along_axis(even, survivors, axis=1), odd], axis=1)
  return Selection(jnp.sort(jnp.concatenate([important, residual], axis=1), axis=1))


def cost(sizes: Sizes) -> int:
  """The class token's attention, and similarities of features in every round."""
  num_important = int(sizes.keep * IMPORTANT_SHARE)
  size, products = sizes.num_image_tokens - num_important, 0
  while size > sizes.keep - num_important:
    products += (size + 1) // 2 * (size // 2)
    size -= min(REMOVED_AT_ONCE, size - (sizes.keep - num_important), (size + 1) // 2)
  return sizes.class_attention() + products * sizes.config.num_features


METHOD = Method(
  source="arXiv 2412.01818v2, 128 tokens",
  criteria=(Criterion(important_and_diverse, cost),),
  acts="before",
  prune_layers=(0,),
  keep=(128 / 576,),
  needs_class_attention=True,
)
