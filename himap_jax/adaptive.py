"""Adaptive keep counts under static shapes: a ladder of schedules, of which every row climbs as far as it has to.

Axes: B batch, S slots, N image tokens, R rungs, D model dim.

All rungs are HiMAP with the same layers. The layers before the first stage run once, in batches as the rows come; then each row
goes to the cheapest rung whose image tokens hold enough of the attention that the instruction pays to the image, and rows of one
rung go on together.
"""

import dataclasses
import itertools

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from himap_jax import prefill as library
from himap_jax.cache import SegmentCache
from himap_jax.layout import Layout
from himap_jax.llava import Inputs, Llava
from himap_jax.method import Selection, top
from himap_jax.methods import build_schedule, himap
from himap_jax.prefill import Prefill, Sequence
from himap_jax.schedule import Schedule, Segment

METHOD = "himap_adaptive"
LADDER = ("25%/6.25%", "50%/12.5%", "75%/37.5%")  # what a rung keeps at each stage
THRESHOLD = 0.8


@dataclasses.dataclass(frozen=True)
class Ladder:
  """Schedules to choose from.

  Attributes:
    rungs: of HiMAP with the same layers, the fewest tokens first.
    threshold: the share of the first stage's scores that the kept tokens of a rung must hold; the last takes every row.
  """

  rungs: tuple[Schedule, ...]
  threshold: float

  def __post_init__(self) -> None:
    """Checks what can be chosen.

    Raises:
      ValueError: fewer than two rungs, rungs that are no ladder, or a threshold that is no share.
    """
    layers = {tuple(stage.layer for stage in rung.stages) for rung in self.rungs}
    if len(self.rungs) < 2 or len(layers) > 1:
      raise ValueError("a ladder needs at least two rungs with the same layers")
    keeps = [tuple(stage.keep for stage in rung.stages) for rung in self.rungs]
    for lower, upper in itertools.pairwise(keeps):
      if not lower[0] < upper[0] or any(a > b for a, b in zip(lower, upper, strict=True)):
        raise ValueError(f"rungs must ascend, but {'/'.join(map(str, upper))} follows {'/'.join(map(str, lower))}")
    if not 0 < self.threshold <= 1:
      raise ValueError(f"the threshold must be above 0 and at most 1, not {self.threshold}")

  @property
  def layer(self) -> int:
    """The layer of the first stage."""
    return self.rungs[0].stages[0].layer


def build_ladder(
  *,
  num_layers: int,
  num_image_tokens: int,
  prune_layers: tuple[int, ...] | None,
  keeps: tuple[tuple[int | float, ...], ...],
  threshold: float,
) -> Ladder:
  """Builds and checks a ladder for a model.

  Args:
    num_layers: the decoder's layers.
    num_image_tokens: image tokens before pruning.
    prune_layers: of every rung; HiMAP's own when None.
    keeps: what each rung keeps, as in `methods.build_schedule`.
    threshold: see `Ladder`.

  Raises:
    ValueError: rungs that are no ladder, or that the model cannot run.
  """
  rungs = [
    build_schedule(
      "himap", num_layers=num_layers, num_image_tokens=num_image_tokens, prune_layers=prune_layers, keep=keep
    )
    for keep in keeps
  ]
  return Ladder(tuple(rungs), threshold)


@flax.struct.dataclass
class Begun:
  """Rows that stand before the first stage.

  Attributes:
    x: `[B, S, D]` hidden states.
    positions: `[B, S]` rotary positions.
    layout: where the image tokens stand.
    order: `[B, N]` the image tokens by score, the highest first.
    cache: of the layers so far.
    keys: a random key a row.
    rung: `[B]` where each row goes.
  """

  x: Float[Array, "B S D"]
  positions: Int[Array, "B S"]
  layout: Layout
  order: Int[Array, "B N"]
  cache: SegmentCache
  keys: Key[Array, "B"]
  rung: Int[Array, "B"]


def begin(model: Llava, params: PyTree, inputs: Inputs, keys: Key[Array, "B"], ladder: Ladder) -> Begun:
  """Runs the prompts up to the first stage and assigns each row its rung.

  Args:
    model: the model.
    params: its parameters.
    inputs: the batch.
    keys: a random key a row.
    ladder: static.
  """
  bound = model.bind({"params": params})
  embedded = bound.embed(inputs)
  segment = Segment(0, ladder.layer, embedded[1].num_image_tokens, None)
  sequence, (cache,), _, projections = library.run_segments(bound, library.start(embedded), (segment,), embedded, keys)
  with jax.named_scope("score"):
    scores = himap.instruction_attention(library.view(bound, ladder.layer, sequence, projections, embedded, keys))
    order, held = rank(scores)
    mass = jnp.stack([held[:, rung.stages[0].keep - 1] for rung in ladder.rungs], axis=1)
  return Begun(
    x=sequence.x,
    positions=sequence.positions,
    layout=sequence.layout,
    order=order,
    cache=cache,
    keys=keys,
    rung=assign(mass, ladder.threshold),
  )


def rank(scores: Float[Array, "B N"]) -> tuple[Int[Array, "B N"], Float[Array, "B N"]]:
  """The image tokens by score, the highest first, and the share of all scores that they hold up to each."""
  order = top(scores, scores.shape[1])
  held = jnp.cumsum(jnp.take_along_axis(scores, order, axis=1), axis=1) / scores.sum(axis=1, keepdims=True)
  return order, held


def assign(mass: Float[Array, "B R"], threshold: float) -> Int[Array, "B"]:
  """The cheapest rung whose tokens hold enough, for each row; the last takes what none does."""
  is_enough = (mass >= threshold).at[:, -1].set(True)
  return jnp.argmax(is_enough, axis=1).astype(jnp.int32)


def finish(model: Llava, params: PyTree, begun: Begun, schedule: Schedule) -> Prefill:
  """Takes rows of one rung to the end of their prefill.

  Args:
    model: the model.
    params: its parameters.
    begun: the rows.
    schedule: the rung; static.
  """
  bound = model.bind({"params": params})
  kept = jnp.sort(begun.order[:, : schedule.stages[0].keep], axis=1)
  with jax.named_scope("gather"):
    x, positions, layout = library.apply(Selection(kept), begun.x, begun.positions, begun.layout)
  segments = schedule.segments(model.config.text.num_hidden_layers, begun.layout.num_image_tokens)
  sequence, caches, kept_later, _ = library.run_segments(
    bound, Sequence(x, positions, layout, kept), segments[1:], None, begun.keys
  )
  return Prefill(library.last_logits(bound, sequence), (begun.cache, *caches), begun.layout.length, (kept, *kept_later))


def regroup(parts: tuple[Begun, ...], rows: Int[Array, "B"]) -> Begun:
  """Some rows of several batches, numbered through."""
  return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[rows], *parts)
