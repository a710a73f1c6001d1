"""What attention logits gain by distance and count, against a slow version written from the mathematics."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from himap_jax.inputs import Calibration
from himap_jax.model import calibration, rope
from himap_jax.model.config import RopeConfig

HEAD_DIM, SLOTS = 16, 9


def slow(positions, theta, is_left, log_count, queries):
  """Entry by entry; `positions` [S, frequencies] in the units of each frequency, which are HEAD_DIM / 2."""
  gain = np.zeros((len(queries), len(positions)))
  for row, m in enumerate(queries):
    for n, position in enumerate(positions):
      closeness = (
        2 / HEAD_DIM * sum(math.cos(t * abs(a - b)) for t, a, b in zip(theta, positions[m], position, strict=True))
      )
      gain[row, n] = log_count[n] + (math.log(2 - closeness) if is_left[n] else 0)
  return gain


AXES = {  # rotated features, RopeConfig, axis of every frequency
  "one axis": (16, RopeConfig(100.0), None),
  "half of a head": (8, RopeConfig(100.0), None),
  "three axes": (16, RopeConfig(100.0, sections=(2, 3, 3)), (0, 0, 1, 1, 1, 2, 2, 2)),
  "three axes in turns": (16, RopeConfig(100.0, sections=(4, 2, 2), interleaved=True), (0, 1, 2, 0, 1, 2, 0, 0)),
}


@pytest.mark.sampled
@pytest.mark.parametrize(("rotary_dim", "config", "axis"), AXES.values(), ids=AXES)
@pytest.mark.parametrize("is_first", [False, True])
def test_is_the_slow_one(rotary_dim, config, axis, is_first):
  rng = np.random.default_rng(0)
  shape = (2, SLOTS) if axis is None else (2, SLOTS, 3)
  positions = rng.integers(0, 700, shape).astype(np.int32)
  is_left, log_count = rng.random((2, SLOTS)) < 0.5, rng.random((2, SLOTS)).astype(np.float32)
  slots = np.array([[3, 8, 3], [0, 1, 7]], np.int32)
  given = Calibration(jnp.asarray(log_count), jnp.asarray(is_left), 4)
  rotation = rope.rotation(config, rotary_dim, jnp.asarray(positions))
  theta = np.zeros(HEAD_DIM // 2)  # features that are not rotated turn by nothing
  theta[: rotary_dim // 2] = 100.0 ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
  for of_slots in (None, jnp.asarray(slots)):
    actual = calibration.gain(rotation, given, HEAD_DIM, of_slots, is_first=is_first)
    for row in range(2):
      own = positions[row][:, list(axis)] if axis else np.repeat(positions[row][:, None], HEAD_DIM // 2, axis=1)
      queries = range(SLOTS) if of_slots is None else slots[row]
      expected = slow(own, theta, is_left[row], log_count[row] * is_first, queries)
      np.testing.assert_allclose(actual[row], expected, atol=2e-4, rtol=0)


def test_a_token_gains_nothing_at_its_own_place():
  """D(0) = 1, and it falls with the distance: a key far away gains up to about log 2."""
  positions = jnp.arange(600, dtype=jnp.int32)[None]
  rotation = rope.rotation(RopeConfig(10_000.0), 128, positions)
  given = Calibration(jnp.zeros((1, 600)), jnp.ones((1, 600), bool), 0)
  gain = np.asarray(calibration.gain(rotation, given, 128, is_first=False)[0])
  np.testing.assert_allclose(np.diag(gain), 0, atol=1e-5)
  assert (np.diff(gain[0, :8]) > 0).all() and 0.4 < gain[0, 599] < math.log(2.2)
