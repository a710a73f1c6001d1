"""How the demo models were trained: the parts of their training, one after another."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from checkpoints_convert.demo.assemble import FEATURE_LAYERS
from experiments.demo_model.data import Shares

FIRST_LAYERS = (11,)  # of the tower, whose features parts 1 to 4 read


class Stage(NamedTuple):
  """Steps at one resolution: pixels along a side, steps, pictures a step, text tokens for the questions of each."""

  image_size: int
  steps: int
  images: int
  question_slots: int


class Rates(NamedTuple):
  """Peak learning rates of the projector, of the low-rank updates, and of what is trained whole in cross-attention."""

  projector: float
  lora: float
  cross: float


@dataclasses.dataclass(frozen=True)
class Part:
  """A part of a training.

  Attributes:
    seed: of the initialisation and of what is drawn.
    start: the earlier parts whose adapters it starts from, with their shares of the mean; empty: from scratch.
    feature_layers: hidden states of the tower that the projector reads.
    rank: of the low-rank updates of a start from scratch.
  """

  name: str
  seed: int
  stages: tuple[Stage, ...]
  rates: Rates
  shares: Shares
  start: Mapping[str, float] = dataclasses.field(default_factory=dict)
  feature_layers: tuple[int, ...] = FIRST_LAYERS
  rank: int = 16


class Recipe(NamedTuple):
  """The parts in their order, and the shares of their adapters in the mean that is the result."""

  parts: tuple[Part, ...]
  result: Mapping[str, float]


def _first_parts(rank: int) -> tuple[Part, ...]:
  """Scenes and easy-VQA; part 4 gains shapes and loses names, so that the mean with part 3 is the best of both."""
  low, full = Stage(168, 840, 3, 208), Stage(336, 200, 1, 208)
  return (
    Part("1", 9, (low, full), Rates(5e-4, 8e-4, 5e-4), Shares(scene=0.75), rank=rank),
    Part("2", 10, (Stage(336, 750, 1, 320),), Rates(3e-4, 6e-4, 4e-4), Shares(scene=0.85), {"1": 1.0}),
    Part("3", 11, (Stage(336, 600, 1, 320),), Rates(3e-4, 6e-4, 4e-4), Shares(scene=0.9), {"2": 1.0}),
    Part("4", 12, (Stage(336, 240, 1, 320),), Rates(1.5e-4, 3e-4, 2e-4), Shares(scene=0.4), {"3": 1.0}),
  )


def _detail(number: int, steps: int, shares: Shares, start: Mapping[str, float]) -> Part:
  stages = (Stage(336, steps, 1, 232),)
  return Part(str(number), 8 + number, stages, Rates(3e-4, 6e-4, 4e-4), shares, start, FEATURE_LAYERS["demo"])


BEST_OF_BOTH = {"3": 0.5, "4": 0.5}
RECIPES = {
  "demo": Recipe(
    (
      *_first_parts(16),
      _detail(5, 2700, Shares(scene=0.15, detail=0.77, drill=0.5), BEST_OF_BOTH),
      _detail(6, 2400, Shares(scene=0.15, detail=0.8, drill=0.75, busy=0.75), {"5": 1.0}),
    ),
    {"6": 1.0},
  ),
  "demo_cross": Recipe(_first_parts(10), BEST_OF_BOTH),
}
