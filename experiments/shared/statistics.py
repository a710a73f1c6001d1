"""Statistics over questions: means, bootstrap intervals and the Pareto front.

Axes: C cells, Q questions, T types, R resamples.
"""

from collections.abc import Hashable, Mapping, Sequence
from statistics import NormalDist

import numpy as np
from jaxtyping import Bool, Float

RESAMPLES = 10_000
LEVEL = 0.95
POWER = 0.8
FLIPS = 20_000
FLIPS_AT_ONCE = 1000
AT_ONCE = 5_000_000  # drawn numbers


def resample(
  values: Float[np.ndarray, "C Q"] | Bool[np.ndarray, "C Q"],
  *,
  groups: Sequence[Hashable] | None = None,
  seed: int = 0,
  resamples: int = RESAMPLES,
) -> Float[np.ndarray, "R C"]:
  """Bootstrap over groups of questions, such as those about one picture: means of samples of as many groups.

  All cells have the same samples. Without groups every question is one of its own.
  """
  groups = range(values.shape[1]) if groups is None else groups
  sums, sizes = group_sums(values, groups), group_sums(np.ones((1, values.shape[1])), groups)
  rng, count, means = np.random.default_rng(seed), sums.shape[1], []
  at_once = max(1, AT_ONCE // count)
  for first in range(0, resamples, at_once):
    times = rng.multinomial(count, np.full(count, 1 / count), size=min(at_once, resamples - first)).astype(np.float64)
    means.append(times @ sums.T / (times @ sizes.T))
  return np.concatenate(means)


def group_sums(
  values: Float[np.ndarray, "C Q"] | Bool[np.ndarray, "C Q"], groups: Sequence[Hashable]
) -> Float[np.ndarray, "C G"]:
  """Sums over the questions of every group, in order of first appearance."""
  places = {group: place for place, group in enumerate(dict.fromkeys(groups))}
  sums = np.zeros((len(values), len(places)))
  np.add.at(sums.T, [places[group] for group in groups], values.T.astype(np.float64))
  return sums


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


def paired_p_values(differences: Float[np.ndarray, "C G"], *, seed: int = 0) -> Float[np.ndarray, "C"]:
  """Two-sided sign-flip permutation tests of mean differences of zero; at least 1 / (`FLIPS` + 1).

  Under the hypothesis the difference of a question, or of the questions about one picture together, is as likely as its
  negative.
  """
  rng, (num_cells, num_groups) = np.random.default_rng(seed), differences.shape
  differences = differences.astype(np.float64)
  sums, extreme = np.abs(differences.sum(axis=1)), np.zeros(num_cells)
  for _ in range(FLIPS // FLIPS_AT_ONCE):
    signs = rng.integers(0, 2, (FLIPS_AT_ONCE, num_groups), dtype=np.int8) * 2.0 - 1.0
    extreme += (np.abs(signs @ differences.T) >= sums - 1e-9).sum(axis=0)
  return (extreme + 1) / (FLIPS + 1)


def holm(p_values: Sequence[float]) -> Float[np.ndarray, "C"]:
  """P-values corrected for their number (Holm 1979); those below a level hold together at that level."""
  p_values = np.asarray(p_values, np.float64)
  order = np.argsort(p_values)
  steps = np.maximum.accumulate(p_values[order] * np.arange(len(order), 0, -1))
  corrected = np.empty_like(p_values)
  corrected[order] = np.minimum(steps, 1.0)
  return corrected


def smallest_difference(num_questions: int, mean_square: float, *, comparisons: int = 1) -> float:
  """The paired difference of accuracies that one test finds with a power of `POWER` at the level of 5%.

  Args:
    mean_square: of a question's difference: for answers that are right or wrong, the share of questions that only one of
      the two answers right.
    comparisons: the level is divided by their number (Bonferroni).
  """
  normal = NormalDist()
  deviations = normal.inv_cdf(1 - (1 - LEVEL) / 2 / comparisons) + normal.inv_cdf(POWER)
  return deviations * (mean_square / num_questions) ** 0.5


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
