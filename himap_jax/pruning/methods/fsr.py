"""FSR: focuses on tokens that matter to the instruction, scans for the farthest from these, refines the scanned ones.

Written from the paper's equations; the code is not published. The authors take relevance from the tower's text encoder;
here it is CDPruner's, of image and instruction tokens at the decoder's input. The paper does not say what happens if
the focus is larger than the number of tokens to keep; here it then ends there, and nothing is scanned.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from himap_jax.inputs import take_slots
from himap_jax.pruning.method import (
  SEQUENCE,
  TOWER,
  Criterion,
  Method,
  Selection,
  View,
  cosine_similarity,
  mark,
  stable_top_k,
)
from himap_jax.pruning.methods.cdpruner import relevance
from himap_jax.pruning.sizes import Sizes

RELEVANCE_POWER = 3
FOCUS_MASS = 0.9
# Below any distance: tokens without a feature come after all others, missing ones last.
NO_FEATURE, MISSING = -1.0, -2.0


def priority(view: View) -> Float[Array, "B N"]:
  """r³s of the relevance r to the instruction and the class attention s, each scaled to [0, 1] (Eq. 3)."""
  has_feature, attention = view.has_feature(), view.class_attention
  low = jnp.where(has_feature, attention, jnp.inf).min(axis=1, keepdims=True)
  high = jnp.where(has_feature, attention, -jnp.inf).max(axis=1, keepdims=True)
  salience = (attention - low) / jnp.maximum(high - low, jnp.finfo(jnp.float32).tiny)
  return jnp.where(has_feature, relevance(view) ** RELEVANCE_POWER * salience, 0.0)


def focus_size(priority: Float[Array, "B N"]) -> Int[Array, "B"]:
  """Tokens of the highest priority that hold 90% of all, at least one (Eq. 4)."""
  held = jnp.cumsum(jnp.sort(priority, axis=1, descending=True), axis=1)
  return 1 + (held < FOCUS_MASS * priority.sum(axis=1, keepdims=True)).sum(axis=1, dtype=jnp.int32)


def focused_and_scanned(
  view: View, priority: Float[Array, "B N"], similarity: Float[Array, "B N N"], keep: int
) -> tuple[Int[Array, "B K"], Bool[Array, "B N"]]:
  """The focus, then by turns the token farthest from all chosen ones (Eq. 5); ascending, and a mask of the focus."""
  has_feature, present = view.has_feature(), view.layout.image_present()
  batch, num_tokens = present.shape
  order = stable_top_k(jnp.where(has_feature, priority, -1.0), num_tokens)
  size = focus_size(priority)
  last = jnp.where(present, NO_FEATURE, MISSING)

  def choose(index, state):
    nearest, chosen, kept = state
    candidate = jnp.where(has_feature, 1 - nearest, last)
    farthest = jnp.where(chosen, -jnp.inf, candidate).argmax(axis=1)
    token = jnp.where(index < size, order[:, index], farthest).astype(jnp.int32)
    to_token = jnp.take_along_axis(similarity, token[:, None, None], axis=2)[:, :, 0]
    chosen |= mark(token[:, None], num_tokens)
    return jnp.maximum(nearest, to_token), chosen, kept.at[:, index].set(token)

  start = (
    jnp.full((batch, num_tokens), -1.0),
    jnp.zeros((batch, num_tokens), bool),
    jnp.zeros((batch, keep), jnp.int32),
  )
  kept = jax.lax.fori_loop(0, keep, choose, start)[2]
  focus = jnp.where(jnp.arange(keep, dtype=jnp.int32)[None] < size[:, None], kept, -1)
  return jnp.sort(kept, axis=1), mark(focus, num_tokens)


def focus_scan_refine(view: View, keep: int) -> Selection:
  """Merges into the scanned tokens as many dropped ones, those most similar to one of them (Eq. 8 and 9).

  A dropped token goes to the most similar scanned one; means are weighted by priority. The focus stays as it is.
  """
  features, has_feature = view.features, view.has_feature()
  num_tokens = features.shape[1]
  weight, similarity = priority(view), cosine_similarity(features, features)
  kept, focus = focused_and_scanned(view, weight, similarity, keep)
  is_kept = mark(kept, num_tokens)
  scanned, dropped = is_kept & ~focus & has_feature, ~is_kept & has_feature
  to_scanned = jnp.where(scanned[:, None], similarity, -jnp.inf)
  likeness = jnp.where(dropped, to_scanned.max(axis=2), -jnp.inf)
  most_alike = stable_top_k(likeness, keep)
  first = jnp.arange(most_alike.shape[1], dtype=jnp.int32)[None] < scanned.sum(axis=1, keepdims=True, dtype=jnp.int32)
  merges = mark(jnp.where(first, most_alike, -1), num_tokens) & dropped
  joins = merges[:, None] & (to_scanned.argmax(axis=2)[:, None] == kept[:, :, None])
  weights = jnp.where(joins | mark(kept[:, :, None], num_tokens), weight[:, None], 0.0)
  total = weights.sum(axis=2, keepdims=True)
  sums = jnp.einsum("BKN,BNF->BKF", weights, features.astype(jnp.float32), precision="highest")
  means = sums / jnp.where(total > 0, total, 1.0)
  own = take_slots(features, kept)
  merged = jnp.where(joins.any(axis=2, keepdims=True) & (total > 0), means.astype(own.dtype), own)
  return Selection(kept, view.project(merged))


def cost(sizes: Sizes) -> int:
  """Class attention, relevance, similarities of all pairs of features, their means, and projecting merged tokens."""
  model = sizes.model
  relevance = sizes.num_present * sizes.num_text_tokens * model.hidden_size
  pairs = sizes.num_present * (sizes.num_present + sizes.keep) * model.num_features
  return sizes.class_attention() + relevance + pairs + sizes.keep * model.connector_flops_per_token


SOURCE = "arXiv 2602.05809, 64 tokens"
CRITERION = Criterion(focus_scan_refine, cost)
METHODS = {"fsr": Method(SOURCE, (CRITERION,), (0,), (64 / 576,), acts="before", needs=TOWER | SEQUENCE)}
