"""Statistics of answers against exact distributions, simulations, all pairs and counts by hand."""

import math

import numpy as np
import pytest

from experiments.shared import statistics
from experiments.shared.statistics import accuracy_by_type, interval, pareto_front, resample


def exact_quantiles(steps, num_questions):
  """Quantiles of a mean of resampled values out of -1, 0, 1, by convolution of their exact distribution."""
  one = np.array([np.mean(steps == value) for value in (-1, 0, 1)])
  total = np.ones(1)
  for _ in range(num_questions):
    total = np.convolve(total, one)
  values = np.arange(-num_questions, num_questions + 1) / num_questions
  return [values[np.searchsorted(np.cumsum(total), level)] for level in (0.025, 0.975)]


def test_bootstrap_against_exact_distributions():
  rng = np.random.default_rng(0)
  reference = rng.random(90) < 0.8
  right = np.stack([reference, reference, reference ^ (rng.random(90) < 0.2), rng.random(90) < 0.5, np.zeros(90, bool)])
  accuracy = resample(right, seed=3)
  for index, row in enumerate(right):
    step = 1 / len(row)
    exact = exact_quantiles(row.astype(int), len(row))
    np.testing.assert_allclose(interval(accuracy[:, index]), exact, atol=1.01 * step)
    exact = exact_quantiles(row.astype(int) - reference.astype(int), len(row))
    np.testing.assert_allclose(interval(accuracy[:, index] - accuracy[:, 0]), exact, atol=1.01 * step)
  np.testing.assert_array_equal(accuracy[:, 1], accuracy[:, 0])
  np.testing.assert_array_equal(accuracy[:, 4], 0.0)
  np.testing.assert_array_equal(resample(right, seed=3), accuracy)
  assert not np.array_equal(resample(right, seed=4, resamples=30), accuracy[:30])


def test_accuracy_by_type():
  right = np.array([[True, False, True, True], [False, False, False, True]])
  found = accuracy_by_type(right, ["b", "a", "b", "a"])
  assert list(found) == ["b", "a"]
  np.testing.assert_array_equal(found["b"], [1.0, 0.0])
  np.testing.assert_array_equal(found["a"], [0.5, 0.5])


def test_pareto_front_against_all_pairs():
  rng = np.random.default_rng(0)
  for _ in range(300):
    costs, values = rng.integers(0, 6, (2, rng.integers(1, 12))).tolist()
    expected = {
      i
      for i in range(len(costs))
      if not any(
        costs[j] <= costs[i] and values[j] >= values[i] and (costs[j], values[j]) != (costs[i], values[i])
        for j in range(len(costs))
      )
    }
    front = pareto_front(costs, values)
    assert set(front) == expected and len(front) == len(expected)
    assert [costs[i] for i in front] == sorted(costs[i] for i in front)


def test_sign_flips_against_the_exact_test():
  """Of differences of 1 and -1 the exact test is McNemar's, a binomial of the smaller count."""
  differences = np.zeros((3, 60))
  for row, (better, worse) in zip(differences, ((14, 4), (6, 6), (9, 2)), strict=True):
    row[:better], row[better : better + worse] = 1, -1
  found = statistics.paired_p_values(differences, seed=1)
  for p_value, (better, worse) in zip(found, ((14, 4), (6, 6), (9, 2)), strict=True):
    total = better + worse
    tail = sum(math.comb(total, count) for count in range(min(better, worse) + 1)) / 2**total
    assert p_value == pytest.approx(min(1.0, 2 * tail), abs=0.01)


def test_holm_by_hand():
  np.testing.assert_allclose(statistics.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
  np.testing.assert_allclose(statistics.holm([0.9, 0.8]), [1.0, 1.0])


def test_the_smallest_difference_is_found_as_often_as_it_says():
  rng, num_questions, disagreement = np.random.default_rng(0), 400, 0.2
  least = statistics.smallest_difference(num_questions, disagreement)
  shares = [(disagreement + least) / 2, (disagreement - least) / 2, 1 - disagreement]
  counts = rng.multinomial(num_questions, shares, size=20_000)
  mean = (counts[:, 0] - counts[:, 1]) / num_questions
  error = np.sqrt(((counts[:, 0] + counts[:, 1]) / num_questions - mean**2) / num_questions)
  assert np.mean(mean / error > 1.96) == pytest.approx(statistics.POWER, abs=0.04)
  many = statistics.smallest_difference(400, 0.2, comparisons=20)  # 3.0233: the normal quantile of 1 − 0.025 / 20
  assert many / least == pytest.approx((3.0233 + 0.8416) / (1.9600 + 0.8416), abs=1e-3)


def test_questions_about_one_picture_are_no_independent_evidence():
  """Asking every question twice changes neither intervals nor p-values, if both are about the same picture."""
  rng = np.random.default_rng(0)
  right = rng.random((3, 80)) < np.array([[0.7], [0.6], [0.7]])
  doubled, pictures = np.repeat(right, 2, axis=1), np.repeat(np.arange(80), 2).tolist()
  np.testing.assert_allclose(resample(doubled, groups=pictures, seed=1), resample(right, seed=1))
  sums = statistics.group_sums(doubled, pictures)
  np.testing.assert_array_equal(sums, 2 * right)
  differences = right[1:].astype(float) - right[:1]
  found = statistics.paired_p_values(statistics.group_sums(np.repeat(differences, 2, axis=1), pictures))
  np.testing.assert_array_equal(found, statistics.paired_p_values(differences))
