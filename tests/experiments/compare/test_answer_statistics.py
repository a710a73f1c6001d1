"""Statistics of answers against exact distributions, all pairs and counts by hand."""

import numpy as np

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
