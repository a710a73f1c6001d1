"""Meshes of eight simulated devices answer as one device."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from himap_jax import GenerationConfig, InputConfig, checkpoint, generate
from himap_jax.engine import sharding

QUESTIONS = ("What is it?", "Why?", "A rather longer question <image> here?", "So?", "And now?")


@pytest.fixture(scope="module")
def answers(checkpoints, images, tmp_path_factory):
  """Returns `answer(name, sizes, batch_size)`: what a mesh answers to five questions."""
  cache_dir = tmp_path_factory.mktemp("cache")

  @functools.cache
  def answer(name, sizes, batch_size, int8_weights=False, restore=False):
    opened = checkpoint.open_checkpoint(str(checkpoints(name).directory), cache_dir=cache_dir)
    loaded = opened.restore(dtype=jnp.float32, mesh=sharding.make_mesh(*sizes), int8_weights=int8_weights)
    layers = (1, opened.config.text.num_hidden_layers - 2)
    return generate(
      loaded,
      [*images, images[0]],
      QUESTIONS,
      schedule=opened.schedule("himap", layers, (checkpoints(name).num_image_tokens // 2, 3), restore=restore),
      generation=GenerationConfig(max_new_tokens=6, ignore_eos=True),
      inputs=InputConfig("<image>{question}:", prompt_buckets=(48,), batch_size=batch_size),
    )

  return answer


# Four, two and one key heads, that the tensor axis divides and does not; batches that the data axis divides and does not.
CASES = [
  ("internvit", (4, 2), 5),
  ("clip_gqa_tied", (8, 1), 2),
  ("clip_gqa_tied", (2, 4), 2),
  ("gemma", (2, 4), 5),
]


@pytest.mark.sampled
@pytest.mark.parametrize(("name", "sizes", "batch_size"), CASES)
def test_answers_are_those_of_one_device(answers, name, sizes, batch_size):
  for actual, expected in zip(answers(name, sizes, batch_size), answers(name, (1, 1), 5), strict=True):
    assert actual.token_ids == expected.token_ids and len(actual.token_ids) == 6
    assert actual.kept == expected.kept and len(actual.kept[1]) == 3
    np.testing.assert_allclose(actual.first_logits, expected.first_logits, atol=1e-4, rtol=0)


@pytest.mark.sampled(of="meshes")
def test_answers_with_restore(answers):
  plain = answers("internvit", (1, 1), 5)
  found, alone = (answers("internvit", sizes, 5, restore=True) for sizes in ((2, 4), (1, 1)))
  for actual, expected, other in zip(found, alone, plain, strict=True):
    assert (actual.token_ids, actual.kept) == (expected.token_ids, expected.kept)
    np.testing.assert_allclose(actual.first_logits, expected.first_logits, atol=1e-4, rtol=0)
    assert np.abs(actual.first_logits - other.first_logits).max() > 1e-3


@pytest.mark.sampled(of="meshes")
def test_answers_of_int8_weights(answers):
  for actual, expected in zip(
    answers("clip_gqa_tied", (2, 4), 4, True), answers("clip_gqa_tied", (1, 1), 5, True), strict=True
  ):
    np.testing.assert_allclose(actual.first_logits, expected.first_logits, atol=1e-4, rtol=0)
    assert actual.kept == expected.kept
