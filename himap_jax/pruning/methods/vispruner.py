"""VisPruner: half of the tokens by class attention, half by removing the most similar of the others."""

import jax.numpy as jnp

from himap_jax.inputs import take_slots
from himap_jax.pruning.method import TOWER, Criterion, Method, Selection, View, cosine_similarity, filled
from himap_jax.pruning.sizes import Sizes

IMPORTANT_SHARE = 0.5
REMOVED_AT_ONCE = 8


def important_and_diverse(view: View, keep: int) -> Selection:
  """Keeps the highest class attention; of the others, in that order, removes the most similar until enough are left.

  Each round compares the tokens at even places with those at odd places, and removes the eight most similar even ones.
  """
  num_important, present = int(keep * IMPORTANT_SHARE), view.has_feature()
  order = jnp.argsort(jnp.where(present, -view.class_attention, jnp.inf), axis=1, stable=True)
  important, residual = order[:, :num_important], order[:, num_important:]
  num_diverse = keep - num_important
  while (size := residual.shape[1]) > num_diverse:
    even, odd = residual[:, ::2], residual[:, 1::2]
    similarity = cosine_similarity(take_slots(view.features, even), take_slots(view.features, odd))
    likeness = jnp.where(take_slots(present, odd)[:, None], similarity, -1.0).max(axis=2, initial=-1.0)
    likeness = jnp.where(take_slots(present, even), likeness, jnp.inf)
    survivors = jnp.argsort(-likeness, axis=1, stable=True)[:, min(REMOVED_AT_ONCE, size - num_diverse) :]
    residual = jnp.concatenate([take_slots(even, survivors), odd], axis=1)
  return Selection(filled(jnp.concatenate([important, residual], axis=1), present))


def cost(sizes: Sizes) -> int:
  """Class attention, and similarities of features in every round."""
  num_important = int(sizes.keep * IMPORTANT_SHARE)
  size, products = sizes.num_image_tokens - num_important, 0
  while size > sizes.keep - num_important:
    products += (size + 1) // 2 * (size // 2)
    size -= min(REMOVED_AT_ONCE, size - (sizes.keep - num_important), (size + 1) // 2)
  return sizes.class_attention() + products * sizes.model.num_features


SOURCE = "arXiv 2412.01818v2, 128 tokens"
CRITERION = Criterion(important_and_diverse, cost)
METHODS = {"vispruner": Method(SOURCE, (CRITERION,), (0,), (128 / 576,), acts="before", needs=TOWER)}
