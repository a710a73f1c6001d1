"""PruMerge+: class-attention outliers and evenly spaced samples, with the most similar tokens merged into each.

The original finds as many outliers as an image has; here a quarter of the kept tokens are outliers, which is its ratio.
Its extra token, the sum of all dropped tokens, has no place in the picture and is left out.
"""

import jax.numpy as jnp

from himap_jax.inputs import take_slots
from himap_jax.pruning.method import (
  TOWER,
  Criterion,
  Method,
  Selection,
  View,
  cosine_similarity,
  filled,
  mark,
  stable_top_k,
)
from himap_jax.pruning.sizes import Sizes

OUTLIER_SHARE = 0.25
CLUSTER = 32


def merged_outliers(view: View, keep: int) -> Selection:
  """Adds to each kept token the 32 others with the most similar keys, weighted by their class attention."""
  features, attention, present = view.features, view.class_attention, view.has_feature()
  batch, num_tokens, _ = features.shape
  num_outliers = round(keep * OUTLIER_SHARE)
  outliers = stable_top_k(jnp.where(present, attention, -jnp.inf), num_outliers)
  is_other = present & ~mark(outliers, num_tokens)
  others = jnp.argsort(~is_other, axis=1, stable=True)
  num_samples = keep - num_outliers
  numbers = jnp.arange(num_samples, dtype=jnp.int32)[None]
  places = numbers * is_other.sum(axis=1, keepdims=True, dtype=jnp.int32) // max(num_samples, 1)
  kept = filled(jnp.concatenate([outliers, take_slots(others, places)], axis=1), present)
  keys = view.tower_keys.reshape(batch, num_tokens, -1)
  similarity = cosine_similarity(take_slots(keys, kept), keys)
  is_candidate = present[:, None] & ~mark(kept[:, :, None], num_tokens)
  cluster = stable_top_k(jnp.where(is_candidate, similarity, -jnp.inf), min(CLUSTER, num_tokens - 1))
  weight = jnp.where(mark(cluster, num_tokens) & is_candidate, attention[:, None], 0.0)
  merged = jnp.einsum("BKN,BNF->BKF", weight, features.astype(jnp.float32), precision="highest").astype(features.dtype)
  return Selection(kept, view.project(take_slots(features, kept) + merged))


def cost(sizes: Sizes) -> int:
  """Class attention, similarities of keys, sums of features, and projecting merged tokens."""
  model = sizes.model
  merging = sizes.num_image_tokens * (model.tower_width + model.num_features)
  return sizes.class_attention() + sizes.keep * (merging + model.connector_flops_per_token)


SOURCE = "arXiv 2403.15388 (PruMerge+), 25% of the tokens"
CRITERION = Criterion(merged_outliers, cost)
METHODS = {"prumerge": Method(SOURCE, (CRITERION,), (0,), (0.25,), acts="before", needs=TOWER)}
