"""The interface of a pruning method: a small pure function from a `View` to a `Selection`, and a description.

Axes: B batch, S slots, M image tokens, I and P slots and image tokens before any pruning, K kept, D model dim.

A row may have fewer than M image tokens. The missing ones are the last of the M (`Layout.image_present`); every method
keeps them only if the row has no others left.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from himap_jax.inputs import Layout, take_slots
from himap_jax.pruning import scoring
from himap_jax.pruning.sizes import Sizes


@dataclasses.dataclass(frozen=True)
class View:
  """Inputs of a method, before the decoder (layer 0) or between two layers.

  Attributes:
    layer: the next layer.
    x: `[B, S, D]` hidden states that enter it.
    query: `[B, S, N, H]` rotated queries of the previous layer; None at layer 0.
    key: `[B, S, K, H]` its rotated keys; None at layer 0.
    value: `[B, S, K, H]` its values; None at layer 0.
    next_layer: maps slots `[B, R]` to the next layer's queries `[B, R, N, H]` and keys `[B, S, K, H]` of the unpruned
      sequence.
    scale: of attention logits.
    embeddings: `[B, I, D]` decoder input before any pruning; None, like the fields up to `tower_keys`, if prefill
      starts between layers.
    embedded_layout: its layout.
    features: `[B, P, F]` tower features of the image tokens.
    class_attention: `[B, P]` attention of the tower's class token to them; None without a class token.
    tower_keys: `[B, P, n, h]` their keys in the tower, by head.
    project: the connector, from features to the decoder's width.
    keys: `[B]` a random key per row, independent of the batch.
    parameters: the method's parameters by name; traced, so new values need no compilation.
    grid: `[B, P, 3]` tile of the row, row and column of the feature of each image token, zeros for newlines; None if the
      features are no grids.
    is_newline: `[B, P]` which image tokens are learned newlines, without a feature; None if none are.
    received: computes `scoring.received_by_slots`.
    gain: maps a layer and queries' slots `[B, Q]` to what attention logits gain there, `[B, Q, S]`; None for nothing.
  """

  layer: int
  x: Float[Array, "B S D"]
  layout: Layout
  query: Float[Array, "B S N H"] | None
  key: Float[Array, "B S K H"] | None
  value: Float[Array, "B S K H"] | None
  next_layer: Callable[[Int[Array, "B R"]], tuple[Float[Array, "B R N H"], Float[Array, "B S K H"]]]
  scale: float
  embeddings: Float[Array, "B I D"] | None
  embedded_layout: Layout | None
  features: Float[Array, "B P F"] | None
  class_attention: Float[Array, "B P"] | None
  tower_keys: Float[Array, "B P n h"] | None
  project: Callable[[Float[Array, "B K F"]], Float[Array, "B K D"]]
  keys: Key[Array, "B"]
  parameters: Mapping[str, Float[Array, ""]]
  grid: Int[Array, "B P 3"] | None = None
  is_newline: Bool[Array, "B P"] | None = None
  received: Callable[..., Float[Array, "B S"]] = scoring.received_by_slots
  gain: Callable[[int, Int[Array, "B Q"]], Float[Array, "B Q S"]] | None = None

  def attention_from(self, rows: Int[Array, "B Q"], valid: Bool[Array, "B Q"] | None = None) -> Float[Array, "B M"]:
    """Attention that image tokens receive from `rows` in the previous layer, summed over rows, averaged over heads."""
    return self._attention(self.layer - 1, take_slots(self.query, rows), self.key, rows, valid)

  def attention_in_next_layer(self, rows: Int[Array, "B Q"]) -> Float[Array, "B M"]:
    """The same in the next layer, of the unpruned sequence."""
    return self._attention(self.layer, *self.next_layer(rows), rows)

  def _attention(
    self,
    layer: int,
    query: Float[Array, "B Q N H"],
    key: Float[Array, "B S K H"],
    rows: Int[Array, "B Q"],
    valid: Bool[Array, "B Q"] | None = None,
  ) -> Float[Array, "B M"]:
    """The same for queries of `rows` and keys of a layer; all rows are valid if `valid` is absent."""
    valid = jnp.ones(rows.shape, bool) if valid is None else valid
    gain = () if self.gain is None else (self.gain(layer, rows),)
    received = self.received(query, key, self.layout.visible(rows), valid, self.scale, *gain)
    return take_slots(received, self.layout.image_slots())

  def has_feature(self) -> Bool[Array, "B P"]:
    """Before the decoder: the image tokens that the row has, without newlines."""
    present = self.layout.image_present()
    return present if self.is_newline is None else present & ~self.is_newline

  def image_tokens(self) -> Float[Array, "B M D"]:
    return take_slots(self.x, self.layout.image_slots())


class Selection(NamedTuple):
  """Image tokens that a method keeps.

  Attributes:
    kept: `[B, K]` indices into the image tokens of the view, ascending.
    merged: `[B, K, D]` hidden states that replace theirs, if the method merges tokens.
    present: `[B, K]` which of them the row keeps, if rows keep different counts.
    order: `[B, K]` their places in the method's ranking, 0 the best, if it ranks tokens.
  """

  kept: Int[Array, "B K"]
  merged: Float[Array, "B K D"] | None = None
  present: Bool[Array, "B K"] | None = None
  order: Int[Array, "B K"] | None = None


@dataclasses.dataclass(frozen=True)
class Criterion:
  """The selection rule of a stage.

  Attributes:
    cost: its multiplications for one row, in matrix products only.
    rank: if the tokens that it keeps at a count are the first of those that it keeps at a higher one: `[B, K]` indices
      of these, best first.
  """

  select: Callable[[View, int], Selection]
  cost: Callable[[Sizes], int]
  rank: Callable[[View, int], Int[Array, "B K"]] | None = None


# What a method may need of a model, and what it means that a model lacks it.
Need = Literal["class_attention", "features", "grid", "sequence"]
NEEDS: dict[Need, str] = {
  "class_attention": "reads the attention of the tower's class token, and this model's tower has none for the whole picture",
  "features": "reads the tower's feature of every image token, and this model's image tokens are made of several each",
  "grid": "reads where the feature of every image token is in the tower's grid, and this model's features are no grid",
  "sequence": (
    "reads attention from image tokens or their hidden states in the decoder, and this model's text reads image tokens "
    "by cross-attention alone"
  ),
}
SEQUENCE: frozenset[Need] = frozenset({"sequence"})
TOWER: frozenset[Need] = frozenset({"class_attention", "features"})

PerDepth = Callable[[int], tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Method:
  """A pruning method.

  Attributes:
    source: the paper.
    criteria: one per stage; a single criterion serves any number of stages.
    prune_layers: the authors' default layers, one per stage, 0 being before the decoder; or a function of the number of
      decoder layers.
    keep: the authors' default share of the image's tokens that remains after each stage, or such a function.
    acts: where its stages may be: `before` the decoder (layer 0), `inside` it, since they read the attention of the
      previous layer, or `anywhere`.
    freezes: whether `prune_layers` are layers in which image tokens are not updated, instead of stages.
    needs: what it reads of a model that not every one has; `sequence` is what a decoder has of image tokens only if they
      are part of its sequence: attention from them, or hidden states that compare with the text's.
    reads_next_layer: whether stages inside the decoder read the attention of the layer after them, not before.
    parameters: parameters that can change without recompilation, with their defaults.
    check: raises `UserError` for invalid values of the parameters.
    uses_chance: whether it draws from the rows' random keys.
  """

  source: str
  criteria: tuple[Criterion, ...] = ()
  prune_layers: tuple[int, ...] | PerDepth = ()
  keep: tuple[float, ...] | Callable[[int], tuple[float, ...]] = ()
  acts: Literal["before", "inside", "anywhere"] = "inside"
  freezes: bool = False
  needs: frozenset[Need] = frozenset()
  reads_next_layer: bool = False
  parameters: Mapping[str, float] = dataclasses.field(default_factory=dict)
  check: Callable[[Mapping[str, float]], None] = lambda parameters: None
  uses_chance: bool = False


def highest(score: Callable[[View], Float[Array, "B M"]], cost: Callable[[Sizes], int]) -> Criterion:
  """The criterion that keeps the highest scores; of equal scores the earlier token."""

  def rank(view: View, keep: int) -> Int[Array, "B K"]:
    return stable_top_k(jnp.where(view.layout.image_present(), score(view), -jnp.inf), keep)

  return ranking(rank, cost)


def ranking(rank: Callable[[View, int], Int[Array, "B K"]], cost: Callable[[Sizes], int]) -> Criterion:
  """The criterion that keeps the first tokens of a ranking."""

  def select(view: View, keep: int) -> Selection:
    ranked = rank(view, keep)
    return Selection(jnp.sort(ranked, axis=1), order=jnp.argsort(ranked, axis=1))

  return Criterion(select, cost, rank)


def selection_of(ranked: Int[Array, "B K"], present: Bool[Array, "B K"]) -> Selection:
  """The selection of ranked tokens, best first, of which a row keeps those that are `present`."""
  ascending = jnp.argsort(ranked, axis=1)
  return Selection(take_slots(ranked, ascending), present=take_slots(present, ascending), order=ascending)


def stable_top_k(scores: Float[Array, "*B M"], count: int) -> Int[Array, "*B K"]:
  """Indices of the highest scores, in descending order; of equal scores the earlier.

  For `jax.lax.top_k` XLA would gather the rows of all devices.
  """
  return jnp.argsort(-scores, axis=-1, stable=True)[..., :count]  # `descending` would reverse twice


def filled(kept: Int[Array, "B K"], present: Bool[Array, "B M"]) -> Int[Array, "B K"]:
  """The kept indices, ascending; duplicates and indices that the row lacks are replaced by others."""
  preference = jnp.where(present, jnp.where(mark(kept, present.shape[1]), 2.0, 1.0), 0.0)
  return jnp.sort(stable_top_k(preference, kept.shape[1]), axis=1)


def mark(indices: Int[Array, "*B K"], size: int) -> Bool[Array, "*B M"]:
  """Mask of the indices; not by a scatter, which XLA would not shard over rows."""
  numbers = jnp.arange(size, dtype=indices.dtype).reshape(*[1] * indices.ndim, size)
  return (indices[..., None] == numbers).any(axis=-2)


def cosine_similarity(x: Float[Array, "B M D"], y: Float[Array, "B K D"]) -> Float[Array, "B M K"]:
  """Cosine similarity of every pair, in float32."""
  x, y = x.astype(jnp.float32), y.astype(jnp.float32)
  x, y = (v / jnp.maximum(jnp.linalg.norm(v, axis=-1, keepdims=True), 1e-12) for v in (x, y))
  return jnp.einsum("BMD,BKD->BMK", x, y, precision="highest")
