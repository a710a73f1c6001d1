"""SCOPE: tokens with much class attention that cover what those chosen before do not."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from himap_jax.pruning.method import TOWER, Method, View, cosine_similarity, mark, ranking
from himap_jax.pruning.sizes import Sizes

NO_FEATURE, MISSING = -1.0, -2.0  # below any gain: tokens without a feature come after all others, missing ones last


def salience_and_coverage(view: View, keep: int) -> Int[Array, "B K"]:
  """Greedy: adds the token v with the highest a_v · Σ_u max(0, s_uv − c_u), then sets c_u = max(c_u, s_uv).

  a is the class token's attention, s the cosine of features, and c_u how well the chosen tokens cover token u, at first
  not at all; the paper's α is 1.
  """
  has_feature, present = view.has_feature(), view.layout.image_present()
  both = has_feature[:, :, None] & has_feature[:, None]
  similarity = jnp.where(both, cosine_similarity(view.features, view.features), 0.0)
  last = jnp.where(present, NO_FEATURE, MISSING)
  batch, num_tokens = present.shape

  def choose(index, state):
    covered, chosen, kept = state
    gain = view.class_attention * jnp.maximum(similarity - covered[:, :, None], 0.0).sum(axis=1)
    candidate = jnp.where(has_feature, gain, last)
    token = jnp.where(chosen, -jnp.inf, candidate).argmax(axis=1).astype(jnp.int32)
    by_token = jnp.take_along_axis(similarity, token[:, None, None], axis=2)[:, :, 0]
    chosen |= mark(token[:, None], num_tokens)
    return jnp.maximum(covered, by_token), chosen, kept.at[:, index].set(token)

  start = (
    jnp.zeros((batch, num_tokens), jnp.float32),
    jnp.zeros((batch, num_tokens), bool),
    jnp.zeros((batch, keep), jnp.int32),
  )
  return jax.lax.fori_loop(0, keep, choose, start)[2]


def cost(sizes: Sizes) -> int:
  """Class attention, and similarities of all pairs of features."""
  return sizes.class_attention() + sizes.num_present**2 * sizes.model.num_features


CRITERION = ranking(salience_and_coverage, cost)
METHODS = {"scope": Method("arXiv 2510.24214, 64 tokens", (CRITERION,), (0,), (64 / 576,), acts="before", needs=TOWER)}
