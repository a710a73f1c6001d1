"""PruMerge+: class-attention outliers and evenly spaced samples, each with the tokens most like it merged in.

The original finds as many outliers as an image has; here a quarter of the kept tokens are, which is its ratio of outliers
to samples. Its one extra token, which sums up all that was dropped, has no place in the picture and is left out.
"""

import jax.numpy as jnp

from himap_jax.method import Criterion, Method, Selection, Sizes, View, cosine_similarity, mark, top

OUTLIER_SHARE = 0.25
CLUSTER = 32


def merged_outliers(view: View, keep: int) -> Selection:
  """To each kept token, the 32 others of most similar keys are added, weighted by their class attention."""
  features, attention = view.tower.features, view.tower.class_attention
  batch, num_tokens, _ = features.shape
  num_outliers = round(keep * OUTLIER_SHARE)
  outliers = top(attention, num_outliers)
  is_outlier = mark(outliers, num_tokens)
  others = jnp.argsort(is_outlier, axis=1, stable=True)[:, : num_tokens - num_outliers]
  num_samples = keep - num_outliers
  places = jnp.arange(num_samples) * others.shape[1] // max(num_samples, 1)
  kept = jnp.sort(jnp.concatenate([outliers, others[:, places]], axis=1), axis=1)
  keys = view.tower.keys.reshape(batch, num_tokens, -1)
  similarity = cosine_similarity(jnp.take_along_axis(keys, kept[:, :, None], axis=1), keys)
  similarity = jnp.where(mark(kept[:, :, None], num_tokens), -jnp.inf, similarity)
  cluster = top(similarity, min(CLUSTER, num_tokens - 1))
  weight = jnp.where(mark(cluster, num_tokens), attention[:, None], 0.0)
  merged = jnp.einsum("BKN,BNF->BKF", weight, features.astype(jnp.float32), precision="highest").astype(features.dtype)
  return Selection(kept, view.project(jnp.take_along_axis(features, kept[:, :, None], axis=1) + merged))


def cost(sizes: Sizes) -> int:
  """The class token's attention, similarities of keys, sums of features, and projecting what was merged."""
  width = sizes.config.vision.hidden_size + sizes.config.num_features
  return sizes.class_attention() + sizes.keep * sizes.num_image_tokens * width + sizes.project(sizes.keep)


METHOD = Method(
  source="arXiv 2403.15388 (PruMerge+), 25% of the tokens",
  criteria=(Criterion(merged_outliers, cost),),
  acts="before",
  prune_layers=(0,),
  keep=(0.25,),
  needs_class_attention=True,
)
