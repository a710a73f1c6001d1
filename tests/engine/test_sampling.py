"""The choice of the next token against slow NumPy and against the probabilities it promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from himap_jax.engine.sampling import MIN_TEMPERATURE, Kind, RowSampling, Sampling, choose, truncate

ROUNDING = 2e-7  # of sums of probabilities in float32

jitted_choose = jax.jit(choose, static_argnums=0)


def keys(count, seed=0):
  return jax.random.split(jax.random.key(seed), count)


def pick(sampling, logits, keys, step=0):
  """`choose` with one sampling and one step for all rows."""
  count = len(logits)
  rows = RowSampling.of([sampling] * count)
  return jitted_choose(Kind.of(sampling), rows, logits, keys, np.full(count, step, np.int32))


def slow_nucleus(logits, top_p):
  """Indices of the smallest set of likeliest tokens that together have `top_p`, one token at a time, in float64."""
  probabilities = np.exp(logits.astype(np.float64) - logits.max())
  probabilities /= probabilities.sum()
  chosen, total = set(), 0.0
  for index in np.argsort(-probabilities):
    if total >= top_p:
      break
    chosen.add(int(index))
    total += probabilities[index]
  return chosen


@pytest.mark.parametrize("top_p", [1e-50, 1e-40, 1e-6, 0.1, 0.5, 0.9, 0.999])
def test_truncation_is_the_slow_one(top_p):
  logits = np.random.default_rng(0).normal(scale=3, size=(16, 50)).astype(np.float32)
  truncated = np.asarray(jax.jit(truncate)(logits, np.full(16, top_p, np.float32)))
  for row, expected in zip(truncated, logits, strict=True):
    inside = np.isfinite(row)
    nucleus = set(np.flatnonzero(inside).tolist())
    assert slow_nucleus(expected, max(top_p - ROUNDING, 1e-60)) <= nucleus <= slow_nucleus(expected, top_p + ROUNDING)
    np.testing.assert_array_equal(row[inside], expected[inside])


def test_top_p_of_one_truncates_nothing():
  logits = jnp.array([[0.0, -80.0, 3.0]])
  np.testing.assert_array_equal(truncate(logits, jnp.ones(1)), logits)


def test_the_least_top_p_is_greedy():
  logits = jnp.array([[0.0, 1.0, 3.0]])
  assert pick(Sampling(1.0, 1e-50), logits, keys(1)).tolist() == [2]


def test_greedy_is_the_first_maximum():
  logits = jnp.array([[0.0, 2.0, 2.0], [5.0, 1.0, 4.0]])
  tokens = pick(Sampling(), logits, keys(2))
  assert tokens.dtype == jnp.int32
  assert tokens.tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax(temperature):
  count = 20_000
  logits = np.array([0.0, 1.0, -1.0, 2.0, -30.0], np.float32)
  tokens = pick(Sampling(temperature), np.tile(logits, (count, 1)), keys(count))
  expected = np.asarray(jax.nn.softmax(logits / temperature))
  frequencies = np.bincount(tokens, minlength=5) / count
  deviation = np.sqrt(expected * (1 - expected) / count)
  assert (np.abs(frequencies - expected) <= 5 * deviation + 1e-9).all()


def test_frequencies_inside_the_nucleus():
  count = 20_000
  logits = np.log(np.array([0.1, 0.4, 0.3, 0.2], np.float32))
  tokens = pick(Sampling(1.0, 0.65), np.tile(logits, (count, 1)), keys(count))
  frequencies = np.bincount(tokens, minlength=4) / count
  np.testing.assert_allclose(frequencies, [0, 4 / 7, 3 / 7, 0], atol=0.02)


def test_a_row_is_its_own():
  """The same key, step and logits choose the same token, whatever the other rows are."""
  logits, own = np.asarray(jax.random.normal(jax.random.key(1), (6, 40))), keys(6)
  sampling = Sampling(1.5, 0.95)
  together = pick(sampling, logits, own).tolist()
  for row in range(6):
    assert pick(sampling, logits[row : row + 1], own[row : row + 1]).tolist() == [together[row]]


def test_steps_and_keys_differ():
  logits = np.zeros((1, 1000), np.float32)
  tokens = {pick(Sampling(1.0), logits, keys(1), step).item() for step in range(8)}
  tokens |= {pick(Sampling(1.0), logits, keys(1, seed)).item() for seed in range(1, 8)}
  assert len(tokens) >= 14


def test_lowest_temperature_is_greedy():
  logits = jnp.array([[30.0, -30.0, 29.0]])
  for top_p in (0.5, 1.0):
    assert pick(Sampling(MIN_TEMPERATURE, top_p), logits, keys(1)).tolist() == [0]


@pytest.mark.parametrize(
  "temperature, top_p, message",
  [
    (-0.1, 1.0, "temperature must be 0, or from"),
    (1e-40, 1.0, "temperature must be 0, or from 1e-06 to 1,000,000, but is 1e-40"),
    (1e39, 1.0, "temperature must be 0, or from 1e-06 to 1,000,000, but is 1e.39"),
    (float("nan"), 1.0, "temperature must be 0, or from"),
    (float("inf"), 1.0, "temperature must be 0, or from"),
    (1.0, 0.0, "top_p must be above 0"),
    (1.0, 1.1, "top_p must be above 0"),
    (1.0, float("nan"), "top_p must be above 0"),
    (0.0, 0.9, "needs a temperature above 0"),
  ],
)
def test_settings_that_cannot_be(temperature, top_p, message):
  with pytest.raises(ValueError, match=message):
    Sampling(temperature, top_p)


def test_rows_have_their_own_sampling():
  """A row of a mixed batch is what it is in a batch of its own kind."""
  samplings = [Sampling(), Sampling(0.7), Sampling(1.3, 0.6), Sampling()]
  logits, own = 3 * np.asarray(jax.random.normal(jax.random.key(2), (4, 60))), keys(4, 5)
  steps = np.array([0, 3, 1, 2], np.int32)
  mixed = jitted_choose(max(map(Kind.of, samplings)), RowSampling.of(samplings), logits, own, steps).tolist()
  for row, sampling in enumerate(samplings):
    alone = pick(sampling, logits[row : row + 1], own[row : row + 1], steps[row])
    assert alone.tolist() == [mixed[row]]
