"""HiMAP with a keep count per row: the fewest tokens that hold enough of the instruction's attention to the image.

A row runs on one of three rungs, each with a keep count for both stages. The first stage takes the cheapest rung whose
tokens hold at least `threshold` of the row's instruction attention, or else the last. A row keeps exactly what HiMAP
with its rung's counts keeps.

Shapes are static, so every row runs in the largest rung's: padding replaces the tokens that a row does not keep, and no
time is saved. FLOPs count a row's own tokens (`Schedule.with_counts`). On the demo model adaptive counts gain nothing
over fixed ones at equal FLOPs.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from himap_jax.errors import UserError
from himap_jax.inputs import take_slots
from himap_jax.pruning.method import SEQUENCE, Criterion, Method, Selection, View, selection_of, stable_top_k
from himap_jax.pruning.methods.himap import IMAGE, INSTRUCTION, image_attention, instruction_attention

# Keep counts of the rungs at each stage, as shares of the largest rung's. If that keeps 75% and 37.5% of the image's
# tokens, the others keep 25% and 6.25%, and 50% and 12.5%.
RUNGS = ((1 / 3, 2 / 3, 1.0), (1 / 6, 1 / 3, 1.0))


def rung_counts(stage: int, keep: int) -> tuple[int, ...]:
  """Keep counts of the rungs at a stage, ascending; `keep` is the largest."""
  return tuple(max(1, round(share * keep)) for share in RUNGS[stage])


def held_share(scores: Float[Array, "B M"]) -> Float[Array, "B M"]:
  """Cumulative share of the scores, highest first."""
  ranked = take_slots(scores, stable_top_k(scores, scores.shape[1]))
  return jnp.cumsum(ranked, axis=1) / scores.sum(axis=1, keepdims=True)


def cheapest_rung(mass: Float[Array, "B R"], threshold: Float[Array, ""]) -> Int[Array, "B"]:
  """Each row's first rung whose tokens hold enough; the last if none does."""
  return jnp.argmax((mass >= threshold).at[:, -1].set(True), axis=1)


def by_instruction(view: View, keep: int) -> Selection:
  """Instruction attention: each row keeps the tokens of the cheapest rung that holds enough of it."""
  present = view.layout.image_present()
  scores = instruction_attention(view)
  held = held_share(jnp.where(present, scores, 0.0))
  counts = jnp.array(rung_counts(0, keep), jnp.int32)
  return _highest(scores, present, counts[cheapest_rung(held[:, counts - 1], view.parameters["threshold"])], keep)


def by_image(view: View, keep: int) -> Selection:
  """Image attention among the row's remaining tokens, whose number identifies its rung."""
  present = view.layout.image_present()
  fewer = jnp.array(rung_counts(0, view.layout.num_image_tokens)[:-1], jnp.int32)
  rung = (present.sum(axis=1, dtype=jnp.int32)[:, None] > fewer[None]).sum(axis=1)
  return _highest(image_attention(view), present, jnp.array(rung_counts(1, keep), jnp.int32)[rung], keep)


def _highest(scores: Float[Array, "B M"], present: Bool[Array, "B M"], count: Int[Array, "B"], keep: int) -> Selection:
  """The `keep` highest scores, of which each row has its own count."""
  ranked = stable_top_k(jnp.where(present, scores, -jnp.inf), keep)
  return selection_of(ranked, take_slots(present, ranked) & (jnp.arange(keep, dtype=jnp.int32)[None] < count[:, None]))


def _check(parameters: Mapping[str, float]) -> None:
  if not 0 < parameters["threshold"] <= 1:
    raise UserError(f"the threshold must be above 0 and at most 1, not {parameters['threshold']}")


SOURCE = "arXiv 2503.13108, keep counts by the attention that they hold"
CRITERIA = (Criterion(by_instruction, INSTRUCTION.cost), Criterion(by_image, IMAGE.cost))
LAYERS, KEEP, PARAMETERS = (2, 8), (0.75, 0.375), {"threshold": 0.8}
_METHOD = Method(SOURCE, CRITERIA, LAYERS, KEEP, parameters=PARAMETERS, check=_check, needs=SEQUENCE)
METHODS = {"himap_adaptive": _METHOD}
