"""Encodings that cells share give the answers that pictures do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoints
import tiny_mllama

from experiments.compare.encoding import EncodingEngine, Encodings
from himap_jax import checkpoint
from himap_jax.engine.batching import Batcher, ImageBucket
from himap_jax.engine.engine import Engine, GenerationConfig

NUM_SLOTS = 112


@pytest.fixture
def in_sequence(loaded, checkpoints, images):
  return loaded("clip_mha"), tiny_checkpoints.pad_batch(checkpoints("clip_mha").rows(images), NUM_SLOTS)


@pytest.fixture
def by_cross_attention(images, tmp_path):
  """A picture of four tiles, and one of two, which is padded to as many."""
  model = checkpoint.load(str(tiny_mllama.make(tmp_path).directory), dtype=jnp.float32, cache_dir=tmp_path / "cache")
  processor = model.prompts()
  examples = [
    processor.prepare([image.resize(size)], "Why?") for image, size in zip(images, [(60, 60), (20, 50)], strict=False)
  ]
  batcher = Batcher(512, processor.blank, [ImageBucket(*examples[0].size, is_ragged=True)], buckets=(80,))
  return model, batcher.pack(examples, bucket=batcher.buckets[0], batch_size=2)


@pytest.mark.sampled
@pytest.mark.parametrize(
  ("rows", "method", "layers", "keep"),
  [
    ("in_sequence", "himap", (2, 4), (8, 4)),
    ("in_sequence", "visionzip", (0,), (7,)),  # which reads the tower's keys and features, too
    ("by_cross_attention", "instruction_attention", (2,), (5,)),
  ],
)
def test_answers_are_those_of_pictures(rows, method, layers, keep, request):
  model, batch = request.getfixturevalue(rows)
  generation, encodings = GenerationConfig(4, ignore_eos=True), Encodings(model.model, 1 << 20)
  schedule = model.schedule(method, layers, keep)
  expected = Engine(model.model, schedule, generation)(batch, range(len(batch.tokens)))
  found = EncodingEngine(encodings, model.model, schedule, generation)(batch, range(len(batch.tokens)))
  assert (found.tokens, found.kept) == (expected.tokens, expected.kept)
  np.testing.assert_allclose(found.logits, expected.logits, atol=1e-4, rtol=0)


def test_pictures_are_encoded_once_while_there_is_memory(loaded, checkpoints, images):
  model = loaded("clip_mha").model
  batch = tiny_checkpoints.pad_batch(checkpoints("clip_mha").rows(images), NUM_SLOTS)
  one = jax.tree.map(lambda x: x[:1], batch)
  num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(Encodings(model, 0)(one).images))
  encodings, seen = Encodings(model, 2 * num_bytes), []
  encode = encodings._encode
  encodings._encode = lambda model, images: seen.append(float(images.pixels.sum())) or encode(model, images)
  again = dataclasses.replace(batch, tokens=batch.tokens + 1)  # other questions about the same pictures
  first, second = encodings(batch), encodings(again)
  assert len(seen) == 4 + 2 and seen[4:] == seen[2:4] and len(set(seen)) == 4
  jax.tree.map(np.testing.assert_array_equal, second.images, first.images)
  np.testing.assert_array_equal(second.tokens, again.tokens)
