"""What a pruning method is: a small pure function from what it sees to what it keeps, and a description.

Axes: B batch, S slots, I slots before any pruning, N image tokens of the picture, M image tokens here, K kept, D model dim.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from himap_jax import scoring
from himap_jax.config import LlavaConfig
from himap_jax.decoder import Projections
from himap_jax.layout import Layout
from himap_jax.vision import TowerOutput


@dataclasses.dataclass(frozen=True)
class View:
  """What a method sees where it acts: before the decoder (layer 0) or between two layers.

  Attributes:
    layer: the layer that comes next.
    x: `[B, S, D]` hidden states that enter it.
    layout: where the image tokens stand in them.
    original: `[B, M]` which of the picture's N tokens the image tokens are, ascending.
    projections: of the layer before; None at layer 0.
    next_projections: computes those of the layer that comes next, as they would be without pruning here, with the
      queries `[B, R, N, H]` of the slots `[B, R]` that it is given.
    embeddings: `[B, I, D]` the decoder's input, before any pruning; None, as what follows, where a prefill is taken up between
      layers.
    embedded_layout: where the image tokens stand in it.
    tower: what the vision tower says of the picture's N tokens.
    project: the projector, from tower features to the decoder's width.
    keys: `[B]` a random key for each row, the same whatever batch the row is in.
  """

  layer: int
  x: Float[Array, "B S D"]
  layout: Layout
  original: Int[Array, "B M"]
  projections: Projections | None
  next_projections: Callable[[Int[Array, "B R"]], Projections]
  embeddings: Float[Array, "B I D"] | None
  embedded_layout: Layout | None
  tower: TowerOutput | None
  project: Callable[[Float[Array, "B K F"]], Float[Array, "B K D"]]
  keys: Key[Array, "B"]

  def attention_from(self, rows: Int[Array, "B Q"], valid: Bool[Array, "B Q"] | None = None) -> Float[Array, "B M"]:
    """Attention that each image token receives from some slots in the layer before, summed, averaged over heads."""
    query = scoring.queries_of(self.projections, rows)
    return scoring.received_attention(query, self.projections.key, self.layout, rows, valid)

  def image_tokens(self) -> Float[Array, "B M D"]:
    """The hidden states of the image tokens."""
    return jnp.take_along_axis(self.x, self.layout.image_slots()[:, :, None], axis=1)


class Selection(NamedTuple):
  """What a method keeps.

  Attributes:
    kept: `[B, K]` indices into the image tokens it saw, ascending.
    merged: `[B, K, D]` what takes the place of those tokens where a method merges; None where they stay as they are.
  """

  kept: Int[Array, "B K"]
  merged: Float[Array, "B K D"] | None = None


@dataclasses.dataclass(frozen=True)
class Sizes:
  """What the cost of a criterion depends on.

  Attributes:
    config: the model.
    num_image_tokens: of the picture, N.
    num_present: image tokens that the criterion sees, M.
    num_text_tokens: text tokens of the prompt; they all stand after the image when costs are counted.
    keep: image tokens that it keeps.
  """

  config: LlavaConfig
  num_image_tokens: int
  num_present: int
  num_text_tokens: int
  keep: int

  @property
  def num_slots(self) -> int:
    """Tokens of the sequence that the criterion sees."""
    return self.num_present + self.num_text_tokens

  def attention(self, num_rows: int) -> int:
    """Multiplications of attention probabilities of some query rows over the sequence, in all heads."""
    text = self.config.text
    return num_rows * self.num_slots * text.num_attention_heads * text.head_dim

  def class_attention(self) -> int:
    """Multiplications of the class token's attention in one layer of the tower."""
    return self.num_image_tokens * self.config.vision.hidden_size

  def project(self, num_tokens: int) -> int:
    """Multiplications of the projector on some tokens."""
    width = self.config.text.hidden_size
    return num_tokens * (self.config.num_features * width + width**2)


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
  """

  source: str
  criteria: tuple[Criterion, ...] = ()
  prune_layers: tuple[int, ...] | PerDepth = ()
  keep: tuple[float, ...] | Callable[[int], tuple[float, ...]] = ()
  acts: Literal["before", "inside", "anywhere"] = "inside"
  freezes: bool = False
  needs_class_attention: bool = False


def highest(score: Callable[[View], Float[Array, "B M"]], cost: Callable[[Sizes], int]) -> Criterion:
  """The criterion that keeps the highest scores; of equal ones the earlier."""

  def select(view: View, keep: int) -> Selection:
    return Selection(jnp.sort(top(score(view), keep), axis=1))

  return Criterion(select, cost)


def top(scores: Float[Array, "*B M"], count: int) -> Int[Array, "*B K"]:
  """Indices of the highest scores, the highest first; of equal ones the earlier.

  As `jax.lax.top_k`, for which XLA would gather the rows of all devices.
  """
  return jnp.argsort(scores, axis=-1, descending=True, stable=True)[..., :count]


def mark(indices: Int[Array, "*B K"], size: int) -> Bool[Array, "*B M"]:
  """Which of `size` numbers are among the indices; no scatter, which XLA would not divide over rows."""
  numbers = jnp.arange(size, dtype=indices.dtype).reshape(*[1] * indices.ndim, size)
  return (indices[..., None] == numbers).any(axis=-2)


def cosine_similarity(x: Float[Array, "B M D"], y: Float[Array, "B K D"]) -> Float[Array, "B M K"]:
  """Cosine of the angle between every pair, in float32."""
  return jnp.einsum("BMD,BKD->BMK", unit(x), unit(y), precision="highest")


def unit(x: Float[Array, "B M D"]) -> Float[Array, "B M D"]:
  """Vectors of length one, in float32."""
  x = x.astype(jnp.float32)
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
