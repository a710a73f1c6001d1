"""What a pruning method is: a small pure function from what it sees to what it keeps, and a description.

Axes: B batch, S slots, M image tokens, I and P slots and image tokens before any pruning, K kept, D model dim.

A row of a batch may have fewer image tokens than M. Those that it lacks are the last of the M (`Layout.image_present`);
every method keeps them only where the row has no others left.
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
  """What a method sees where it acts: before the decoder (layer 0) or between two layers.

  Attributes:
    layer: the layer that comes next.
    x: `[B, S, D]` hidden states that enter it.
    layout: what each slot holds.
    query: `[B, S, N, H]` rotated queries of the layer before; None at layer 0.
    key: `[B, S, K, H]` its rotated keys; None at layer 0.
    next_layer: computes the queries `[B, R, N, H]` of the slots `[B, R]` it is given and the keys `[B, S, K, H]` of the
      layer that comes next, as they would be without pruning here.
    scale: of attention logits.
    embeddings: `[B, I, D]` the decoder's input before any pruning; None, as what follows up to `tower_keys`, where a
      prefill starts between layers.
    embedded_layout: what each slot of it holds.
    features: `[B, P, F]` the vision tower's features of the image tokens.
    class_attention: `[B, P]` attention of the tower's class token to them; None where the tower has no class token.
    tower_keys: `[B, P, n, h]` keys of them in the tower, by head.
    project: the connector, from features to the decoder's width.
    keys: `[B]` a random key for each row, the same whatever batch the row is in.
    parameters: the method's parameters by name; traced, so that other values need no other program.
  """

  layer: int
  x: Float[Array, "B S D"]
  layout: Layout
  query: Float[Array, "B S N H"] | None
  key: Float[Array, "B S K H"] | None
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

  def attention_from(self, rows: Int[Array, "B Q"], valid: Bool[Array, "B Q"] | None = None) -> Float[Array, "B M"]:
    """Attention that each image token receives from some slots in the layer before, summed, averaged over heads."""
    query = take_slots(self.query, rows)
    return scoring.received_attention(query, self.key, self.layout, rows, scale=self.scale, valid=valid)

  def image_tokens(self) -> Float[Array, "B M D"]:
    """The hidden states of the image tokens."""
    return take_slots(self.x, self.layout.image_slots())


class Selection(NamedTuple):
  """What a method keeps.

  Attributes:
    kept: `[B, K]` indices into the image tokens it saw, ascending.
    merged: `[B, K, D]` what takes the place of those tokens where a method merges; None where they stay as they are.
    present: `[B, K]` which of them the row keeps, where rows keep different counts; None where each keeps all K.
  """

  kept: Int[Array, "B K"]
  merged: Float[Array, "B K D"] | None = None
  present: Bool[Array, "B K"] | None = None


@dataclasses.dataclass(frozen=True)
class Criterion:
  """What a stage keeps, and what deciding that costs.

  Attributes:
    select: chooses a number of image tokens.
    cost: multiplications of it for one row, in products of matrices alone.
  """

  select: Callable[[View, int], Selection]
  cost: Callable[[Sizes], int]


PerDepth = Callable[[int], tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Method:
  """A pruning method.

  Attributes:
    source: the paper.
    criteria: what each stage keeps; a single criterion serves any number of stages.
    prune_layers: the authors' default layers, one a stage, 0 being before the decoder; or a function of the number of
      decoder layers, where the default depends on it.
    keep: the authors' default share of the image's tokens that remains after each stage, or such a function.
    acts: where its stages may be: `before` the decoder (layer 0), `inside` it, since they read the attention of the
      layer before, or `anywhere`.
    freezes: whether `prune_layers` are layers in which image tokens are kept but not updated, instead of stages.
    needs_class_attention: whether it reads the attention of the tower's class token.
    parameters: its numbers that may be chosen without compiling again, with their defaults.
    check: raises `UserError` where a value of the parameters makes no sense.
  """

  source: str
  criteria: tuple[Criterion, ...] = ()
  prune_layers: tuple[int, ...] | PerDepth = ()
  keep: tuple[float, ...] | Callable[[int], tuple[float, ...]] = ()
  acts: Literal["before", "inside", "anywhere"] = "inside"
  freezes: bool = False
  needs_class_attention: bool = False
  parameters: Mapping[str, float] = dataclasses.field(default_factory=dict)
  check: Callable[[Mapping[str, float]], None] = lambda parameters: None


def highest(score: Callable[[View], Float[Array, "B M"]], cost: Callable[[Sizes], int]) -> Criterion:
  """The criterion that keeps the highest scores; of equal ones the earlier."""

  def select(view: View, keep: int) -> Selection:
    scores = jnp.where(view.layout.image_present(), score(view), -jnp.inf)
    return Selection(jnp.sort(stable_top_k(scores, keep), axis=1))

  return Criterion(select, cost)


def stable_top_k(scores: Float[Array, "*B M"], count: int) -> Int[Array, "*B K"]:
  """Indices of the highest scores, the highest first; of equal ones the earlier.

  As `jax.lax.top_k`, for which XLA would gather the rows of all devices.
  """
  return jnp.argsort(scores, axis=-1, descending=True, stable=True)[..., :count]


def filled(kept: Int[Array, "B K"], present: Bool[Array, "B M"]) -> Int[Array, "B K"]:
  """As many different indices, ascending: those kept, with others in place of duplicates and of ones the row lacks."""
  preference = jnp.where(present, jnp.where(mark(kept, present.shape[1]), 2.0, 1.0), 0.0)
  return jnp.sort(stable_top_k(preference, kept.shape[1]), axis=1)


def mark(indices: Int[Array, "*B K"], size: int) -> Bool[Array, "*B M"]:
  """Which of `size` numbers are among the indices; no scatter, which XLA would not divide over rows."""
  numbers = jnp.arange(size, dtype=indices.dtype).reshape(*[1] * indices.ndim, size)
  return (indices[..., None] == numbers).any(axis=-2)


def cosine_similarity(x: Float[Array, "B M D"], y: Float[Array, "B K D"]) -> Float[Array, "B M K"]:
  """Cosine of the angle between every pair, in float32."""
  x, y = x.astype(jnp.float32), y.astype(jnp.float32)
  x, y = (v / jnp.maximum(jnp.linalg.norm(v, axis=-1, keepdims=True), 1e-12) for v in (x, y))
  return jnp.einsum("BMD,BKD->BMK", x, y, precision="highest")
