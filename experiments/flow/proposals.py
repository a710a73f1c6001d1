"""Turns measurements into schedules: the layers and keep counts with the smallest loss at a price.

Axes: L layers, Q questions, N image tokens.
"""

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from himap_jax.errors import UserError

SHARES = (0.25, 0.375, 0.5, 0.625, 0.75)  # candidates for the first stage's keep count, as shares of the image tokens
LEAST = 4  # the second stage's smallest keep count

Two = tuple[int, int]  # layers or keep counts of the two stages
Price = Callable[[Two, Two], float]  # (layers, keep counts) → a price that grows with the keep counts


@dataclasses.dataclass(frozen=True)
class Measured:
  """Measurements on the calibration questions."""

  to_instruction: Float[np.ndarray, "L Q N"]  # saliency of the flow from each image token into the instruction
  to_image: Float[np.ndarray, "L Q N"]  # the same into the image
  instruction_weight: Float[np.ndarray, "L"]  # change of answers without the flow into the instruction in a layer
  image_weight: Float[np.ndarray, "L"]  # the same without the flow into the image
  instruction_scores: Float[np.ndarray, "L Q N"]  # HiMAP's first-stage scores after each layer
  image_scores: Float[np.ndarray, "L Q N"]  # its second-stage scores

  @functools.cached_property
  def flow_weights(self) -> Float[np.ndarray, "L Q N"]:
    """Each image token's share of a layer's flow × the layer's effect on the answers; sums to 1 for a question."""
    flows = (self.to_instruction, self.instruction_weight), (self.to_image, self.image_weight)
    least = np.finfo(np.float32).tiny
    total = sum(
      weight[:, None, None] * flow / np.maximum(flow.sum(axis=2, keepdims=True), least) for flow, weight in flows
    )
    return total / total.sum(axis=(0, 2), keepdims=True)

  @functools.cached_property
  def later_weights(self) -> Float[np.ndarray, "L+1 Q N"]:
    """Weight of each image token's flow from each layer on; 0 after the last."""
    from_last = np.cumsum(self.flow_weights[::-1], axis=0)
    return np.concatenate([from_last[::-1], np.zeros_like(from_last[:1])])


class Proposal(NamedTuple):
  """A HiMAP schedule and its loss."""

  prune_layers: Two
  keep: Two
  lost: float  # share of the weighted flow that comes from dropped tokens
  covered: tuple[float, float]  # share of each stage's scores held by its kept tokens

  @property
  def key(self) -> str:
    return "/".join(map(str, (*self.prune_layers, *self.keep)))


def candidates(num_layers: int, num_image_tokens: int, price: Price, budget: float) -> Iterator[tuple[Two, Two]]:
  """Yields layers and keep counts within the budget, each with the largest affordable second keep count."""
  firsts = dict.fromkeys(round(share * num_image_tokens) for share in SHARES)
  for layers, first in itertools.product(itertools.combinations(range(1, num_layers), 2), firsts):
    seconds = range(min(LEAST, first), first + 1)
    affordable = bisect.bisect_right(
      seconds, budget, key=lambda second, on=layers, first=first: price(on, (first, second))
    )
    if affordable:
      yield layers, (first, seconds[affordable - 1])


def check_budget(num_layers: int, num_image_tokens: int, price: Price, budget: float) -> None:
  """Raises `UserError` if nothing is within the budget."""
  if next(candidates(num_layers, num_image_tokens, price, budget), None) is None:
    raise UserError(f"no schedule with two stages costs as little as {budget:.1%} of no pruning; raise --budget")


def propose(measured: Measured, price: Price, budget: float, *, count: int) -> list[Proposal]:
  """The `count` schedules with the smallest loss within the budget, one per pair of layers; `UserError` if none."""
  num_layers, _, num_image_tokens = measured.to_image.shape
  check_budget(num_layers, num_image_tokens, price, budget)
  found = (assess(measured, *choice) for choice in candidates(num_layers, num_image_tokens, price, budget))
  best: dict[Two, Proposal] = {}
  for proposal in sorted(found, key=lambda proposal: proposal.lost):
    best.setdefault(proposal.prune_layers, proposal)
  return list(best.values())[:count]


def assess(measured: Measured, layers: Two, keep: Two) -> Proposal:
  """The proposal of these layers and counts: the share of the flow that its dropped tokens would have carried."""
  present, lost, covered = np.True_, 0.0, []
  later = [*(measured.later_weights[layer] for layer in layers), 0]
  scores = measured.instruction_scores[layers[0] - 1], measured.image_scores[layers[1] - 1]
  for stage in range(2):
    kept = highest(np.where(present, scores[stage], -np.inf), keep[stage])
    lost += np.where(kept, 0, later[stage] - later[stage + 1]).sum(axis=1)
    held, all_scores = (np.where(tokens, scores[stage], 0).sum(axis=1) for tokens in (kept, present))
    covered.append(float((held / all_scores).mean()))
    present = kept
  return Proposal(layers, keep, float(lost.mean()), tuple(covered))


def highest(scores: Float[np.ndarray, "Q N"], count: int) -> Bool[np.ndarray, "Q N"]:
  """Marks the `count` highest scores of each question."""
  ranks = np.argsort(np.argsort(-scores, axis=1, kind="stable"), axis=1)
  return ranks < count


def finished(flow: Sequence[float], share: float) -> int:
  """The first layer from which on at most this share of a flow is left."""
  left = np.cumsum(np.asarray(flow)[::-1])[::-1] / np.sum(flow)
  return int(np.argmax(np.append(left, 0) <= share))
