"""Sliding windows: what is visible, and that a window that hides nothing leaves the kernels' fast path as it is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoints

from himap_jax.inputs import UNUSED_ORDER, visible
from himap_jax.model import cache, decoder


def test_windows_count_in_order():
  """Gaps that pruning leaves are counted, and padding is never seen."""
  order = jnp.array([[0, 3, 4, 7, UNUSED_ORDER]], jnp.int32)
  expected = [
    [1, 0, 0, 0, 0],  # 0
    [0, 1, 0, 0, 0],  # 3
    [0, 1, 1, 0, 0],  # 4
    [0, 0, 0, 1, 0],  # 7
  ]
  np.testing.assert_array_equal(visible(order, order[:, :4], 3)[0], np.array(expected, bool))
  np.testing.assert_array_equal(cache.visible(order, order[:, 3] + 1, 5)[0, 0, 0], [False, False, True, True, False])


@pytest.mark.sampled
@pytest.mark.parametrize(
  ("name", "length", "masked"),
  [
    ("clip_mha", 64, [False] * 6),
    ("mistral", 64, [True] * 6),
    ("mistral", 23, [True] * 6),
    ("mistral", 22, [False] * 6),
    ("qwen2", 64, [False] * 3 + [True] * 3),
    ("qwen2", 10, [False] * 6),
    ("gemma", 64, [False] * 4),
  ],
)
def test_only_windows_that_hide_something_make_masks(name, length, masked, loaded, checkpoints, images, monkeypatch):
  monkeypatch.setattr(decoder, "traced_once", lambda layer, *methods: layer)  # to see every layer
  model, found = loaded(name).model, []

  def attention(query, key, value, mask=None, *, is_causal=False):
    if is_causal:
      found.append(mask is not None)
    return query

  kernels = dataclasses.replace(model.network.kernels, attention=attention)
  model = model.replace(network=model.network.clone(kernels=kernels))
  batch = tiny_checkpoints.pad_batch([checkpoints(name).encode(images[0], "<image>?")], 64)
  jax.eval_shape(lambda model, inputs: model.bind(length)(inputs), model, batch)
  assert found == masked
