"""Statistics of results by question: means, bootstrap intervals and the Pareto front.

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
  """Bootstrap over questions: means in samples of as many questions, the same sample for every cell."""
  rng = np.random.default_rng(seed)
  num_questions = values.shape[1]
  means = []
  for first in range(0, resamples, AT_ONCE):
    size = min(AT_ONCE, resamples - first)
    times = rng.multinomial(num_questions, np.full(num_questions, 1 / num_questions), size=size)
    means.append(times.astype(np.float64) @ values.T.astype(np.float64) / num_questions)
  return np.concatenate(means)


def interval(values: Float[np.ndarray, "R *C"]) -> tuple[Float[np.ndarray, "*C"], Float[np.ndarray, "*C"]]:
  """The ends of the 95% percentile intervals of resampled values."""
  low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
  return low, high


def names(name: str) -> tuple[str, str, str]:
  """The names of a value and of the ends of its interval."""
  return name, f"{name}_low", f"{name}_high"


def with_interval(name: str, value: float, resampled: Float[np.ndarray, "R"]) -> dict[str, float]:
  """A value and the ends of its interval by their names."""
  return dict(zip(names(name), map(float, (value, *interval(resampled))), strict=True))


def mean_with_interval(name: str, values: Float[np.ndarray, "Q"], *, seed: int) -> dict[str, float]:
  """The mean over questions and the ends of its interval by their names."""
  return with_interval(name, values.mean(), resample(values[None], seed=seed)[:, 0])


def accuracy_by_type(right: Float[np.ndarray, "C Q"], types: Sequence[str]) -> dict[str, Float[np.ndarray, "C"]]:
  """The mean score of each cell by type of question, types in the order of their first appearance."""
  types = np.asarray(types)
  return {str(type): right[:, types == type].mean(axis=1) for type in dict.fromkeys(types.tolist())}


def pareto_front(costs: Sequence[float], values: Sequence[float]) -> list[int]:
  """Indices of the Pareto front by ascending cost; points that are equal in both cost and value are all on it."""
  order = sorted(range(len(costs)), key=lambda i: (costs[i], -values[i]))
  front = []
  for i in order:
    last = front[-1] if front else None
    if last is None or values[i] > values[last] or (values[i] == values[last] and costs[i] == costs[last]):
      front.append(i)
  return front
