"""HiMAP's stages with scores or contents that are not the picture's own.

Axes: B batch, M image tokens, K kept, D model dim.

Rows come in pairs: two pictures, one question. A row's partner is the other one of its pair.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from himap_jax.layout import take_slots
from himap_jax.method import Criterion, Selection, View, top
from himap_jax.methods.himap import image_attention, instruction_attention
from himap_jax.schedule import Schedule, Stage

Score = Callable[[View], Float[Array, "B M"]]

SCORES: tuple[Score, Score] = (instruction_attention, image_attention)


def partner(x: Array) -> Array:
  """What the partner of every row has."""
  return x.reshape(-1, 2, *x.shape[1:])[:, ::-1].reshape(x.shape)


def shuffled(view: View, scores: Float[Array, "B M"]) -> Float[Array, "B M"]:
  """The scores, dealt out anew among the picture's tokens."""
  keys = jax.vmap(lambda key: jax.random.fold_in(key, view.layer))(view.keys)
  return jax.vmap(jax.random.permutation)(keys, scores)


# How a stage's scores are manipulated; the picture stays as it is.
MANIPULATIONS: dict[str, Callable[[View, Float[Array, "B M"]], Float[Array, "B M"]]] = {
  "own": lambda view, scores: scores,
  "partner's": lambda view, scores: partner(scores),
  "shuffled": shuffled,
  "reversed": lambda view, scores: -scores,
}


def with_scores(schedule: Schedule, name: str) -> Schedule:
  """HiMAP's schedule with manipulated scores.

  Args:
    schedule: HiMAP's.
    name: a key of `MANIPULATIONS`. From the second stage on, partners have kept different tokens, and a token's score is that
      of the partner's token of the same rank.
  """
  manipulate = MANIPULATIONS[name]

  def stage(own: Stage, score: Score) -> Stage:
    def select(view: View, keep: int) -> Selection:
      return Selection(jnp.sort(top(manipulate(view, score(view)), keep), axis=1))

    return Stage(own.layer, own.keep, Criterion(select, own.criterion.cost))

  return Schedule(tuple(map(stage, schedule.stages, SCORES)))


def with_partner_s_contents(schedule: Schedule, *, chosen_by_partner: bool) -> Schedule:
  """HiMAP's schedule on the partner's picture: at the first stage its hidden states take the place of the row's own.

  Args:
    schedule: HiMAP's.
    chosen_by_partner: whether the tokens that stay are those that the partner's scores choose, or the row's own.
  """
  first, second = schedule.stages

  def select(view: View, keep: int) -> Selection:
    scores = instruction_attention(view)
    kept = jnp.sort(top(partner(scores) if chosen_by_partner else scores, keep), axis=1)
    return Selection(kept, take_slots(partner(view.image_tokens()), kept))

  return Schedule((Stage(first.layer, first.keep, Criterion(select, first.criterion.cost)), second))
