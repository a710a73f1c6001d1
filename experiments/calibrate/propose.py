"""From measured flows to schedules: which layers and keep counts lose least at a price.

Axes: L layers, Q questions, N image tokens.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

SHARES = (0.25, 0.375, 0.5, 0.625, 0.75)  # of the image tokens that the first stage may keep
LEAST = 4  # image tokens that the second stage keeps at least


class Measured(NamedTuple):
  """What is known of the calibration questions.

  Attributes:
    to_instruction: `[L, Q, N]` saliency of what flows from each image token into the instruction.
    to_image: `[L, Q, N]` that of what flows from it into the image.
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
  """A schedule of HiMAP, and what it loses.

  Attributes:
    prune_layers: K1 and K2.
    keep: image tokens after each stage.
    lost: the share of the weighted flow that dropped tokens would have carried.
    covered: the share of its own scores that each stage keeps.
  """

  prune_layers: tuple[int, int]
  keep: tuple[int, int]
  lost: float
  covered: tuple[float, float]


def matter(measured: Measured) -> Float[np.ndarray, "L Q N"]:
  """What each image token's flow in each layer matters: its share of the flow × how much that flow matters to answers.

  All of a question's add up to 1.
  """
  total = np.zeros(measured.to_image.shape)
  for flow, weight in (
    (measured.to_instruction, measured.instruction_weight),
    (measured.to_image, measured.image_weight),
  ):
    total += weight[:, None, None] * flow / np.maximum(flow.sum(axis=2, keepdims=True), np.finfo(np.float32).tiny)
  return total / total.sum(axis=(0, 2), keepdims=True)


def matter_later(measured: Measured) -> Float[np.ndarray, "L+1 Q N"]:
  """What each image token's flow matters from each layer on, and nothing after the last."""
  weights = matter(measured)
  return np.concatenate([np.cumsum(weights[::-1], axis=0)[::-1], np.zeros((1, *weights.shape[1:]))])


def candidates(
  num_layers: int, num_image_tokens: int, price: Callable[[tuple[int, int], tuple[int, int]], float], budget: float
) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
  """Layers and keep counts that cost no more than the budget and could not keep one token more at the second stage.

  Args:
    num_layers: of the decoder.
    num_image_tokens: before pruning.
    price: of layers and keep counts; grows with the counts.
    budget: the highest price.
  """
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


def propose(
  measured: Measured, price: Callable[[tuple[int, int], tuple[int, int]], float], budget: float, *, count: int
) -> list[Proposal]:
  """The schedules that lose least, the best first; of each pair of layers only the best.

  Args:
    measured: of the calibration questions.
    price: see `candidates`.
    budget: see `candidates`.
    count: how many.

  Raises:
    ValueError: none is within the budget.
  """
  num_layers, _, num_image_tokens = measured.to_image.shape
  later = matter_later(measured)
  best: dict[tuple[int, int], Proposal] = {}
  for layers, keep in candidates(num_layers, num_image_tokens, price, budget):
    proposal = assess(measured, later, layers, keep)
    if layers not in best or proposal.lost < best[layers].lost:
      best[layers] = proposal
  if not best:
    raise ValueError(f"no schedule with two stages costs as little as {budget:.1%} of no pruning; raise --budget")
  return sorted(best.values(), key=lambda proposal: proposal.lost)[:count]


def assess(
  measured: Measured, later: Float[np.ndarray, "L+1 Q N"], layers: tuple[int, int], keep: tuple[int, int]
) -> Proposal:
  """What a schedule loses.

  Args:
    measured: of the calibration questions.
    later: from `matter_later`.
    layers: K1 and K2.
    keep: image tokens after each stage.
  """
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
  """Where the highest scores are, as many of each question."""
  kept = np.zeros(scores.shape, bool)
  np.put_along_axis(kept, np.argsort(-scores, axis=1, kind="stable")[:, :count], True, axis=1)
  return kept


def finished(flow: Sequence[float], share: float) -> int:
  """The first layer from which on no more than a share of a flow is left."""
  left = np.cumsum(np.asarray(flow)[::-1])[::-1] / np.sum(flow)
  return int(np.argmax(np.append(left, 0) <= share))
