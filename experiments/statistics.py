"""What the answers amount to: accuracies with intervals, and which methods are not beaten.

Axes: C cells, Q questions, T types, R resamples.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

RESAMPLES = 10_000
LEVEL = 0.95
AT_ONCE = 500


def resample(
  values: Float[np.ndarray, "C Q"] | Bool[np.ndarray, "C Q"], *, seed: int = 0, resamples: int = RESAMPLES
) -> Float[np.ndarray, "R C"]:
  """Bootstrap over questions: means in samples of as many questions, the same sample for every cell.

  Args:
    values: of each cell and question, such as whether its answer is right.
    seed: of the resampling.
    resamples: how many.
  """
  rng = np.random.default_rng(seed)
  num_questions = values.shape[1]
  means = []
  for first in range(0, resamples, AT_ONCE):
    size = min(AT_ONCE, resamples - first)
    times = rng.multinomial(num_questions, np.full(num_questions, 1 / num_questions), size=size)
    means.append(times.astype(np.float64) @ values.T.astype(np.float64) / num_questions)
  return np.concatenate(means)


def interval(values: Float[np.ndarray, "R *C"]) -> tuple[Float[np.ndarray, "*C"], Float[np.ndarray, "*C"]]:
  """The 95% percentile intervals of what was resampled."""
  low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
  return low, high


def with_interval(name: str, value: float, resampled: Float[np.ndarray, "R"]) -> dict[str, float]:
  """A value by its name, and the ends of its interval as `name_low` and `name_high`."""
  low, high = map(float, interval(resampled))
  return {name: float(value), f"{name}_low": low, f"{name}_high": high}


def accuracy_by_type(right: Float[np.ndarray, "C Q"], types: Sequence[str]) -> dict[str, Float[np.ndarray, "C"]]:
  """The mean over questions of how right the answers of every cell are, by type in the order of appearance."""
  types = np.asarray(types)
  return {str(type): right[:, types == type].mean(axis=1) for type in dict.fromkeys(types.tolist())}


def pareto_front(costs: Sequence[float], values: Sequence[float]) -> list[int]:
  """Indices, by ascending cost, of what nothing else equals or beats in both cost and value, and beats in one."""
  order = sorted(range(len(costs)), key=lambda i: (costs[i], -values[i]))
  front = []
  for i in order:
    last = front[-1] if front else None
    if last is None or values[i] > values[last] or (values[i] == values[last] and costs[i] == costs[last]):
      front.append(i)
  return front
