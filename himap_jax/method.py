"""What a pruning method is: a small pure function from what it sees to what it keeps, and a description.

Axes: B batch, S slots, I slots before any pruning, N image tokens of the picture, M image tokens here, K kept, D model dim.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

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
    next_projections: computes those of the layer that comes next, as they would be without pruning here.
    embeddings: `[B, I, D]` the decoder's input, before any pruning.
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
  next_projections: Callable[[], Projections]
  embeddings: Float[Array, "B I D"]
  embedded_layout: Layout
  tower: TowerOutput
  project: Callable[[Float[Array, "B K F"]], Float[Array, "B K D"]]
  keys: Key[Array, "B"]

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


Select = Callable[[View, int], Selection]
PerDepth = Callable[[int], tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Method:
  """A pruning method.

  Attributes:
    source: the paper.
    selects: what each stage keeps; a single function serves any number of stages.
    prune_layers: the authors' default layers, one a stage, 0 being before the decoder; or a function of the number of
      decoder layers, where the default depends on it.
    keep: the authors' default share of the image's tokens that remains after each stage, or such a function.
    acts: where its stages may be: `before` the decoder (layer 0), `inside` it, since they read the attention of the
      layer before, or `anywhere`.
    freezes: whether `prune_layers` are layers in which image tokens are kept but not updated, instead of stages.
    needs_class_attention: whether it reads the attention of the tower's class token.
  """

  source: str
  selects: tuple[Select, ...] = ()
  prune_layers: tuple[int, ...] | PerDepth = ()
  keep: tuple[float, ...] | Callable[[int], tuple[float, ...]] = ()
  acts: Literal["before", "inside", "anywhere"] = "inside"
  freezes: bool = False
  needs_class_attention: bool = False


def highest(score: Callable[[View], Float[Array, "B M"]]) -> Select:
  """A method's function that keeps the highest scores; of equal ones the earlier."""

  def select(view: View, keep: int) -> Selection:
    return Selection(jnp.sort(jax.lax.top_k(score(view), keep)[1], axis=1))

  return select


def cosine_similarity(x: Float[Array, "B M D"], y: Float[Array, "B K D"]) -> Float[Array, "B M K"]:
  """Cosine of the angle between every pair, in float32."""
  return jnp.einsum("BMD,BKD->BMK", unit(x), unit(y), precision="highest")


def unit(x: Float[Array, "B M D"]) -> Float[Array, "B M D"]:
  """Vectors of length one, in float32."""
  x = x.astype(jnp.float32)
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
