"""Adaptive keep counts: its attention says which rung a row is on, and it has what HiMAP with those counts has."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_himap
import tiny_checkpoints
import torch

from himap_jax import GenerationConfig, build_schedule, checkpoint
from himap_jax.engine import sharding
from himap_jax.engine.engine import Engine
from himap_jax.engine.prefill import prefill
from himap_jax.engine.programs import method_parameters

NAME, LAYERS = "dinov2_shrunk", (1, 3)  # of four layers, with 16 image tokens
KEEPS = ((4, 1), (8, 2), (12, 6))  # the rungs below 12 and 6
BATCH, SLOTS, NEW = 6, 80, 5
QUESTIONS = ("Where?", "What is it?", "Why?", "Is there anything else to see?", "How many?", "Which one is blue?")


def schedule_of(method, keep, parameters=None):
  own = {"num_image_tokens": 16, "keep": keep, "parameters": parameters}
  return build_schedule(method, num_layers=4, prune_layers=LAYERS, **own)


def adaptive(threshold):
  return schedule_of("himap_adaptive", KEEPS[-1], {"threshold": threshold})


def rows_of(tiny, images):
  return [
    tiny.encode(images[i % 4], f"<s>USER: <image>\n{question} ASSISTANT:") for i, question in enumerate(QUESTIONS)
  ]


def generate(model, schedule, inputs):
  engine = Engine(model, schedule, GenerationConfig(NEW, ignore_eos=True))
  return engine(inputs, range(BATCH)), engine


@pytest.fixture(scope="module")
def subject(checkpoints, loaded, images):
  tiny, model = checkpoints(NAME), loaded(NAME).model
  rows = rows_of(tiny, images)
  inputs = tiny_checkpoints.pad_batch(rows, SLOTS)
  fixed = functools.cache(lambda keep: generate(model, schedule_of("himap", keep), inputs)[0])
  return tiny, rows, inputs, model, fixed


def assert_same_row(ours, row, theirs):
  assert ours.tokens[row] == theirs.tokens[row]
  np.testing.assert_allclose(ours.logits[row], theirs.logits[row], atol=1e-4)
  assert [stage[row] for stage in ours.kept] == [stage[row] for stage in theirs.kept]


@pytest.mark.sampled
@pytest.mark.parametrize("threshold, rung", [(1e-6, 0), (1.0, 2)])
def test_all_rows_on_one_rung_are_its_schedule(subject, threshold, rung):
  _, _, inputs, model, fixed = subject
  ours, _ = generate(model, adaptive(threshold), inputs)
  for row in range(BATCH):
    assert [len(stage[row]) for stage in ours.kept] == list(KEEPS[rung])
    assert_same_row(ours, row, fixed(KEEPS[rung]))


def masses_in_torch(tiny, rows):
  """What share of the instruction's attention in the layer before the first stage each rung would keep."""
  result = []
  for ids, pixels in rows:
    with torch.no_grad():
      hidden, first, last = reference_himap.embed(tiny.model, ids, pixels)
      decoder, positions = tiny.model.model.language_model, torch.arange(len(ids))
      for layer in decoder.layers[: LAYERS[0]]:
        hidden, attention = reference_himap.run_layer(decoder, layer, hidden, positions)
    scores = attention[last + 1 :, first : last + 1].sum(0).sort(descending=True).values
    result.append([float(scores[:keep].sum() / scores.sum()) for keep, _ in KEEPS])
  return np.array(result)


def test_each_row_goes_where_its_attention_says(subject):
  tiny, rows, inputs, model, fixed = subject
  mass = masses_in_torch(tiny, rows)
  threshold = float(np.sort(mass[:, 1])[1:3].mean())  # between two rows' shares on the middle rung
  expected = [int(np.argmax([*(row[:2] >= threshold), True])) for row in mass]
  assert len(set(expected)) > 1
  ours, _ = generate(model, adaptive(threshold), inputs)
  for row, rung in enumerate(expected):
    assert [len(stage[row]) for stage in ours.kept] == list(KEEPS[rung])
    assert_same_row(ours, row, fixed(KEEPS[rung]))


def test_neighbours_do_not_matter_and_nothing_is_compiled_again(subject):
  _, _, inputs, model, _ = subject
  whole, engine = generate(model, adaptive(0.6), inputs)
  settled = engine.programs.num_programs
  order = [3, 0, 4, 1, 1, 5]
  some = jax.tree.map(lambda x: np.asarray(x)[order], inputs)
  again = engine(some, order)
  for place, row in enumerate(order):
    assert again.tokens[place] == whole.tokens[row]
    assert [stage[place] for stage in again.kept] == [stage[row] for stage in whole.kept]
    np.testing.assert_allclose(again.logits[place], whole.logits[row], atol=1e-4)
  assert engine.programs.num_programs == settled
  other, engine = generate(model, adaptive(0.9), inputs)
  assert engine.programs.num_programs == 0
  assert other.kept != whole.kept


def test_another_threshold_is_not_traced_again(subject):
  _, _, inputs, model, _ = subject
  schedule = adaptive(0.5)
  keys = jax.random.split(jax.random.key(0), BATCH)

  @jax.jit
  @chex.assert_max_traces(n=1)
  def run(inputs, keys, parameters):
    return prefill(model.bind(), inputs, keys, schedule, parameters).kept

  counts = []
  for threshold in (0.1, 0.5, 0.7, 0.9, 1.0):
    first, _ = run(inputs, keys, method_parameters(adaptive(threshold)))
    counts.append((np.asarray(first) >= 0).sum(axis=1))
  assert (np.diff(counts, axis=0) >= 0).all()
  assert (counts[0] < counts[-1]).all()


@pytest.mark.sampled(of="meshes")
def test_on_several_devices(checkpoints, images, tmp_path):
  tiny = checkpoints(NAME)
  inputs = tiny_checkpoints.pad_batch(rows_of(tiny, images), SLOTS)
  results = []
  for mesh in ({}, {"data": 2, "tensor": 2}):
    opened = checkpoint.open_checkpoint(str(tiny.directory), cache_dir=tmp_path)
    loaded = opened.restore(dtype=jnp.float32, mesh=sharding.make_mesh(**mesh))
    results.append(generate(loaded.model, adaptive(0.7), inputs)[0])
  assert results[0].kept == results[1].kept
  assert results[0].tokens == results[1].tokens
  assert len({len(row) for row in results[0].kept[0]}) > 1
