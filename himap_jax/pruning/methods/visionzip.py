"""VisionZip: dominant tokens by class attention, the others merged into contextual ones.

The authors also keep the class token; here the decoder sees image tokens only.
"""

import jax
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

CONTEXTUAL_SHARE = 10 / 64


def dominant_and_contextual(view: View, keep: int) -> Selection:
  """Keeps the highest class attention, and evenly spaced others, to which the means of their nearest tokens are added.

  Nearness is the cosine of the feature layer's keys, averaged over heads.
  """
  num_contextual = round(CONTEXTUAL_SHARE * keep)
  num_dominant = keep - num_contextual
  features, present = view.features, view.has_feature()
  attention = jnp.where(present, view.class_attention, -jnp.inf)
  num_tokens = features.shape[1]
  if num_contextual == 0 or keep == num_tokens:
    return Selection(jnp.sort(stable_top_k(attention, keep), axis=1))
  dominant = stable_top_k(attention, num_dominant)
  is_other = present & ~mark(dominant, num_tokens)
  others = jnp.argsort(~is_other, axis=1, stable=True)
  step = jnp.maximum(is_other.sum(axis=1, keepdims=True, dtype=jnp.int32) // num_contextual, 1)
  targets = take_slots(others, jnp.arange(num_contextual, dtype=jnp.int32)[None] * step)
  merges = is_other & ~mark(targets, num_tokens)
  keys = view.tower_keys.mean(axis=2)
  similarity = cosine_similarity(keys, take_slots(keys, targets))
  nearest = jax.nn.one_hot(similarity.argmax(axis=2), num_contextual, dtype=jnp.float32)
  assigned = nearest * merges[:, :, None].astype(jnp.float32)
  sums = jnp.einsum("BNC,BNF->BCF", assigned, features.astype(jnp.float32), precision="highest")
  means = sums / jnp.maximum(assigned.sum(axis=1), 1.0)[:, :, None]
  features = jax.vmap(lambda x, at, added: x.at[at].add(added))(features, targets, means.astype(features.dtype))
  kept = filled(jnp.concatenate([dominant, targets], axis=1), present)
  return Selection(kept, view.project(take_slots(features, kept)))


def cost(sizes: Sizes) -> int:
  """Class attention, similarities of keys, sums of features, and projecting merged tokens."""
  num_contextual, model = round(CONTEXTUAL_SHARE * sizes.keep), sizes.model
  merging = sizes.num_image_tokens * num_contextual * (model.tower_width // model.tower_heads + model.num_features)
  return sizes.class_attention() + merging + sizes.keep * model.connector_flops_per_token


SOURCE = "arXiv 2412.04467, 54 + 10 tokens"
CRITERION = Criterion(dominant_and_contextual, cost)
METHODS = {"visionzip": Method(SOURCE, (CRITERION,), (0,), (64 / 576,), acts="before", needs=TOWER)}
