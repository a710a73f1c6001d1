"""VisionTrim: tokens with much class attention in even surroundings; dropped ones merged by what text they resemble.

Written from the paper's equations of the stage before the decoder; the one inside is left out. What they leave open is
as in the authors' repository (Apache-2.0): windows of 3 × 3 with the token itself, half the weight for distance in the
grid, three rounds of merging, a quarter of the tokens merged. That code differs from the equations, and so from this
file: it takes the σ of local affinity of single features and coordinates (here of the distances in all windows, our
reading), applies the softmax to it twice and divides by nine at the border, too; it chooses by half the class attention
and half the attention that image tokens receive from each other; and it merges plain means by cosine similarity.

The authors take text from the tower's text encoder. A LLaVA checkpoint has none, so here image and instruction tokens
are compared at the decoder's input. Scores are normalised over the row, not over each tile.
"""

import itertools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from himap_jax.inputs import put_slots, take_slots
from himap_jax.pruning.method import SEQUENCE, TOWER, Criterion, Method, Selection, View, filled, mark, stable_top_k
from himap_jax.pruning.sizes import Sizes

REACH = 1  # of the window, in tokens to every side
PLACE_WEIGHT = 0.5
EPSILON = 1e-6
MERGED_SHARE = 16 / 64
ROUNDS = 3
TINY = jnp.finfo(jnp.float32).tiny


def variance(x: Float[Array, "B *N"], valid: Bool[Array, "B *N"]) -> Float[Array, "B"]:
  """Variance of each row's valid numbers."""
  axes = tuple(range(1, x.ndim))
  return jnp.square(x - x.mean(axis=axes, keepdims=True, where=valid)).mean(axis=axes, where=valid)


def windows(view: View) -> tuple[Float[Array, "B N W"], Float[Array, "B N W"], Bool[Array, "B N W"]]:
  """Distance in features and in the grid from each token to those of its window, and a mask of those that exist."""
  features, grid, has_feature = view.features.astype(jnp.float32), view.grid, view.has_feature()
  steps = list(itertools.product(range(-REACH, REACH + 1), repeat=2))
  distances, found = [], []
  for step in steps:
    wanted = grid + jnp.array([[[0, *step]]], jnp.int32)
    is_neighbour = (wanted[:, :, None] == grid[:, None]).all(axis=3) & has_feature[:, None]
    distances.append(jnp.linalg.norm(features - take_slots(features, is_neighbour.argmax(axis=2)), axis=2))
    found.append(is_neighbour.any(axis=2) & has_feature)
  exists = jnp.stack(found, axis=2)
  lengths = jnp.array([math.hypot(*step) for step in steps], jnp.float32)
  return jnp.stack(distances, axis=2), jnp.broadcast_to(lengths, exists.shape), exists


def local_affinity(view: View) -> Float[Array, "B N"]:
  """The softmax of −(d/σ)² − ½(d'/σ')², averaged over each token's window.

  d and d' are the distances in features and in the grid, σ and σ' their standard deviations over the row.
  """
  distance, length, exists = windows(view)
  feature_scale, place_scale = (jnp.maximum(variance(x, exists), EPSILON)[:, None, None] for x in (distance, length))
  affinity = -jnp.square(distance) / feature_scale - PLACE_WEIGHT * jnp.square(length) / place_scale
  count = jnp.maximum(exists.sum(axis=2, dtype=jnp.float32), 1.0)
  return jax.nn.softmax(jnp.where(exists, affinity, 0.0).sum(axis=2) / count, axis=1, where=view.has_feature())


def importance(view: View) -> Float[Array, "B N"]:
  """αg + (1 − α)l of the softmax g of class attention and local affinity l; α is the share of l in their variances."""
  has_feature = view.has_feature()
  by_class, by_window = jax.nn.softmax(view.class_attention, axis=1, where=has_feature), local_affinity(view)
  of_class, of_window = variance(by_class, has_feature), variance(by_window, has_feature)
  alpha = (of_window / jnp.maximum(of_class + of_window, TINY))[:, None]
  return alpha * by_class + (1 - alpha) * by_window


def merged_by_text(
  view: View, dropped: Bool[Array, "B N"], count: int
) -> tuple[Int[Array, "B R"], Float[Array, "B R F"]]:
  """The dropped tokens that the instruction resembles most, and their features with those of the other ones.

  Of image tokens V and instruction tokens T, a centre has the highest softmax(TVᵀ/√D) over the dropped tokens, averaged
  over the text. Another dropped token joins the centre with the highest product of their softmax(VTᵀ/√D) over the text,
  the earlier of equal ones. Each round adds to a centre the mean of its tokens, weighted by these products.
  """
  slots, valid = view.layout.instruction_slots()
  text, features = take_slots(view.x, slots).astype(jnp.float32), view.features.astype(jnp.float32)

  def products(tokens: Float[Array, "B M D"]) -> Float[Array, "B M T"]:
    dots = jnp.einsum("BMD,BTD->BMT", tokens.astype(jnp.float32), text, precision="highest")
    return dots * text.shape[2] ** -0.5

  def text_shares(tokens: Float[Array, "B M D"]) -> Float[Array, "B M T"]:
    return jax.nn.softmax(products(tokens), axis=2, where=valid[:, None])

  tokens = view.image_tokens()
  by_text = jax.nn.softmax(products(tokens), axis=1, where=dropped[:, :, None])
  score = jnp.where(valid[:, None], by_text, 0.0).sum(axis=2)
  centres = jnp.sort(stable_top_k(jnp.where(dropped, score, -jnp.inf), count), axis=1)
  others = dropped & ~mark(centres, dropped.shape[1])
  shares, merged = text_shares(tokens), take_slots(features, centres)
  for _ in range(ROUNDS):
    own = text_shares(view.project(merged.astype(view.features.dtype)))
    likeness = jnp.einsum("BMT,BRT->BMR", shares, own, precision="highest")
    joins = jax.nn.one_hot(likeness.argmax(axis=2), count, dtype=bool) & others[:, :, None]
    weights = jnp.where(joins, likeness, 0.0)
    weights = weights / jnp.maximum(weights.sum(axis=1, keepdims=True), TINY)
    merged = merged + jnp.einsum("BMR,BMF->BRF", weights, features, precision="highest")
  return centres, merged.astype(view.features.dtype)


def dominant_and_complement(view: View, keep: int) -> Selection:
  """Keeps the most important tokens, and centres into which the others are merged."""
  num_merged = round(MERGED_SHARE * keep)
  scores, features = jnp.where(view.has_feature(), importance(view), -jnp.inf), view.features
  dominant = stable_top_k(scores, keep - num_merged)
  if num_merged == 0:
    return Selection(jnp.sort(dominant, axis=1))
  dropped = view.has_feature() & ~mark(dominant, features.shape[1])
  centres, merged = merged_by_text(view, dropped, num_merged)
  features = put_slots(features, centres, merged)
  kept = filled(jnp.concatenate([dominant, centres], axis=1), view.layout.image_present())
  return Selection(kept, view.project(take_slots(features, kept)))


def cost(sizes: Sizes) -> int:
  """Class attention, products with text, and in every round projecting centres, their products, sums of features."""
  model, count = sizes.model, round(MERGED_SHARE * sizes.keep)
  products = sizes.num_text_tokens * model.hidden_size
  joining = sizes.num_present * count * (sizes.num_text_tokens + model.num_features)
  rounds = ROUNDS * (count * (model.connector_flops_per_token + products) + joining)
  projecting = sizes.keep * model.connector_flops_per_token
  return sizes.class_attention() + (sizes.num_present * products + rounds + projecting if count else 0)


SOURCE = "arXiv 2601.22674, 48 + 16 tokens"
CRITERION = Criterion(dominant_and_complement, cost)
NEEDED = TOWER | SEQUENCE | {"grid"}
METHODS = {"visiontrim": Method(SOURCE, (CRITERION,), (0,), (64 / 576,), acts="before", needs=NEEDED)}
