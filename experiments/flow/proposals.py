"""From measurements to schedules: the layers and keep counts that lose least at a price.

Axes: L layers, Q questions, N image tokens.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from himap_jax.errors import UserError

SHARES = (0.25, 0.375, 0.5, 0.625, 0.75)  # candidates for the first stage's keep count, in shares of the image tokens
LEAST = 4  # the second stage's smallest keep count

Two = tuple[int, int]  # layers or keep counts of the two stages
Price = Callable[[Two, Two], float]  # from layers and keep counts to a price that grows with the keep counts


class Measured(NamedTuple):
  """Measurements on the calibration questions.

  Attributes:
    to_instruction: `[L, Q, N]` saliency of the flow from each image token into the instruction.
    to_image: `[L, Q, N]` saliency of the flow from each image token into the image.
    instruction_weight: `[L]` how much the answers change when the flow into the instruction is taken out of a layer.
    image_weight: `[L]` the same for the flow within the image.
    instruction_scores: `[L, Q, N]` attention from the instruction, HiMAP's first score after each layer.
    image_scores: `[L, Q, N]` attention from the image, its second score.
  """

  to_instruction: Float[np.ndarray, "L Q N"]
  to_image: Float[np.ndarray, "L Q N"]
  instruction_weight: Float[np.ndarray, "L"]
  image_weight: Float[np.ndarray, "L"]
  instruction_scores: Float[np.ndarray, "L Q N"]
  image_scores: Float[np.ndarray, "L Q N"]


@dataclasses.dataclass(frozen=True)
class Proposal:
  """A schedule of HiMAP, and its loss.

  Attributes:
    prune_layers: K1 and K2.
    keep: image tokens after each stage.
    lost: the share of the weighted flow that comes from dropped tokens.
    covered: the share of each stage's scores that its kept tokens hold.
  """

  prune_layers: Two
  keep: Two
  lost: float
  covered: tuple[float, float]


def flow_weights(measured: Measured) -> Float[np.ndarray, "L Q N"]:
  """The weight of each image token's flow in each layer: its share of the flow × the layer's effect on answers.

  Those of a question add up to 1.
  """
  total = np.zeros(measured.to_image.shape)
  for flow, weight in (
    (measured.to_instruction, measured.instruction_weight),
    (measured.to_image, measured.image_weight),
  ):
    total += weight[:, None, None] * flow / np.maximum(flow.sum(axis=2, keepdims=True), np.finfo(np.float32).tiny)
  return total / total.sum(axis=(0, 2), keepdims=True)


def later_weights(measured: Measured) -> Float[np.ndarray, "L+1 Q N"]:
  """The weight of each image token's flow from each layer on; 0 after the last."""
  weights = flow_weights(measured)
  return np.concatenate([np.cumsum(weights[::-1], axis=0)[::-1], np.zeros((1, *weights.shape[1:]))])


def candidates(num_layers: int, num_image_tokens: int, price: Price, budget: float) -> Iterator[tuple[Two, Two]]:
  """Layers and keep counts within the budget, each with the highest keep count that the second stage can have."""
  for layers in itertools.combinations(range(1, num_layers), 2):
    for first in dict.fromkeys(round(share * num_image_tokens) for share in SHARES):
      if price(layers, (first, min(LEAST, first))) > budget:
        continue
      low, high = min(LEAST, first), first
      while low < high:
        middle = (low + high + 1) // 2
        if price(layers, (first, middle)) <= budget:
          low = middle
        else:
          high = middle - 1
      yield layers, (first, low)


def propose(measured: Measured, price: Price, budget: float, *, count: int) -> list[Proposal]:
  """The `count` schedules with the smallest loss within the budget, ascending; of each pair of layers only the best.

  Raises:
    UserError: none is within the budget.
  """
  num_layers, _, num_image_tokens = measured.to_image.shape
  later = later_weights(measured)
  best: dict[Two, Proposal] = {}
  for layers, keep in candidates(num_layers, num_image_tokens, price, budget):
    proposal = assess(measured, later, layers, keep)
    if layers not in best or proposal.lost < best[layers].lost:
      best[layers] = proposal
  if not best:
    raise UserError(f"no schedule with two stages costs as little as {budget:.1%} of no pruning; raise --budget")
  return sorted(best.values(), key=lambda proposal: proposal.lost)[:count]


def assess(measured: Measured, later: Float[np.ndarray, "L+1 Q N"], layers: Two, keep: Two) -> Proposal:
  """A schedule with its loss; `later` comes from `later_weights`."""
  first_scores, second_scores = measured.instruction_scores[layers[0] - 1], measured.image_scores[layers[1] - 1]
  first = highest(first_scores, keep[0])
  second = highest(np.where(first, second_scores, -np.inf), keep[1])
  between = later[layers[0]] - later[layers[1]]
  lost = np.where(first, 0, between).sum(axis=1) + np.where(second, 0, later[layers[1]]).sum(axis=1)
  covered = (
    np.where(first, first_scores, 0).sum(axis=1) / first_scores.sum(axis=1),
    np.where(second, second_scores, 0).sum(axis=1) / np.where(first, second_scores, 0).sum(axis=1),
  )
  return Proposal(layers, keep, float(lost.mean()), tuple(float(share.mean()) for share in covered))


def highest(scores: Float[np.ndarray, "Q N"], count: int) -> Bool[np.ndarray, "Q N"]:
  """Marks as many of the highest scores of each question."""
  kept = np.zeros(scores.shape, bool)
  np.put_along_axis(kept, np.argsort(-scores, axis=1, kind="stable")[:, :count], True, axis=1)
  return kept


def finished(flow: Sequence[float], share: float) -> int:
  """The first layer from which on at most this share of a flow is left."""
  left = np.cumsum(np.asarray(flow)[::-1])[::-1] / np.sum(flow)
  return int(np.argmax(np.append(left, 0) <= share))
