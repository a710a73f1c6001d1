"""Statistics over questions: means, bootstrap intervals and the Pareto front.

Axes: C cells, Q questions, T types, R resamples.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float

RESAMPLES = 10_000
LEVEL = 0.95
AT_ONCE = 5_000_000  # drawn numbers


def resample(
  values: Float[np.ndarray, "C Q"] | Bool[np.ndarray, "C Q"], *, seed: int = 0, resamples: int = RESAMPLES
) -> Float[np.ndarray, "R C"]:
  """Bootstrap over questions: means of samples of as many questions, the same sample for every cell."""
  rng, count, means = np.random.default_rng(seed), values.shape[1], []
  at_once = max(1, AT_ONCE // count)
  for first in range(0, resamples, at_once):
    times = rng.multinomial(count, np.full(count, 1 / count), size=min(at_once, resamples - first))
    means.append(times.astype(np.float64) @ values.T.astype(np.float64) / count)
  return np.concatenate(means)


def interval(values: Float[np.ndarray, "R *C"]) -> tuple[Float[np.ndarray, "*C"], Float[np.ndarray, "*C"]]:
  """The ends of the 95% percentile intervals of resampled values."""
  low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
  return low, high


def names(name: str) -> tuple[str, str, str]:
  return name, f"{name}_low", f"{name}_high"


def with_interval(name: str, value: float, resampled: Float[np.ndarray, "R"]) -> dict[str, float]:
  return dict(zip(names(name), map(float, (value, *interval(resampled))), strict=True))


def mean_rows(columns: Mapping[str, Float[np.ndarray, "C Q"]], *, seed: int = 0) -> list[dict[str, float]]:
  """One row per cell: the mean over questions of each column, with its interval."""
  rows: list[dict[str, float]] = [{} for _ in next(iter(columns.values()))]
  for name, values in columns.items():
    for row, mean, resampled in zip(rows, values.mean(axis=1), resample(values, seed=seed).T, strict=True):
      row |= with_interval(name, mean, resampled)
  return rows


def accuracy_by_type(right: Float[np.ndarray, "C Q"], types: Sequence[str]) -> dict[str, Float[np.ndarray, "C"]]:
  """Mean score of each cell by question type, in order of first appearance."""
  types = np.asarray(types)
  return {str(type): right[:, types == type].mean(axis=1) for type in dict.fromkeys(types.tolist())}


def pareto_front(costs: Sequence[float], values: Sequence[float]) -> list[int]:
  """Indices of the Pareto front by ascending cost; points equal in cost and value are all on it."""
  front: list[int] = []
  for i in sorted(range(len(costs)), key=lambda i: (costs[i], -values[i])):
    if not front or values[i] > values[front[-1]] or (values[i], costs[i]) == (values[front[-1]], costs[front[-1]]):
      front.append(i)
  return front
