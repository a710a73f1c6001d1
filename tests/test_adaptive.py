"""Adaptive keep counts: every row runs as on its rung's own schedule, and the rung is the one that the attention says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_himap
import tiny_checkpoints
import torch

from himap_jax import checkpoint, sharding
from himap_jax.adaptive import Ladder
from himap_jax.adaptive_generation import AdaptiveGenerator
from himap_jax.generation import Generator
from himap_jax.llava import Inputs
from himap_jax.methods import build_schedule

NAMES = ("dinov2",)
LAYERS = (2, 4)
KEEPS = ((4, 2), (8, 3), (12, 6))
BATCH, NUM_BATCHES, SLOTS, NEW = 2, 3, 80, 5
QUESTIONS = ("Where?", "What is it?", "Why?", "Is there anything else to see?", "How many?")


def rung_of(name, keep):
  num_image_tokens = 25 if name == "dinov2" else 16
  return build_schedule("himap", num_layers=6, num_image_tokens=num_image_tokens, prune_layers=LAYERS, keep=keep)


def ladder_of(name, threshold):
  return Ladder(tuple(rung_of(name, keep) for keep in KEEPS), threshold)


def rows_of(tiny, images):
  """Five rows, padded to six as a call wants whole batches."""
  rows = [
    tiny.encode(images[i % 4], f"<s>USER: <image>\n{question} ASSISTANT:") for i, question in enumerate(QUESTIONS)
  ]
  return rows, [*rows, rows[-1]], [0, 1, 2, 3, 4, 4]


@pytest.fixture(scope="module", params=NAMES)
def subject(request, checkpoints, loaded, images):
  tiny, model = checkpoints(request.param), loaded(request.param)
  rows, padded, ids = rows_of(tiny, images)
  inputs = Inputs(**tiny_checkpoints.pad_batch(padded, SLOTS))

  def run(threshold, inputs=inputs, ids=ids):
    generator = AdaptiveGenerator(
      model, ladder_of(request.param, threshold), batch_size=BATCH, num_batches=NUM_BATCHES, max_new_tokens=NEW,
      ignore_eos=True,
    )  # fmt: skip
    return generator(inputs, ids), generator

  def fixed(keep):
    generator = Generator(model, rung_of(request.param, keep), max_new_tokens=NEW, ignore_eos=True)
    return generator(inputs, ids)

  return tiny, rows, inputs, run, fixed


def assert_same_row(ours, row, theirs):
  assert ours.tokens[row] == theirs.tokens[row]
  np.testing.assert_allclose(ours.logits[row], theirs.logits[row], atol=1e-4)
  for mine, other in zip(ours.kept, theirs.kept, strict=True):
    np.testing.assert_array_equal(mine[row], other[row])


@pytest.mark.parametrize("threshold, rung", [(1e-6, 0), (1.0, 2)])
def test_all_rows_on_one_rung_are_its_schedule(subject, threshold, rung):
  *_, run, fixed = subject
  ours, _ = run(threshold)
  theirs = fixed(KEEPS[rung])
  np.testing.assert_array_equal(ours.rungs, [rung] * 6)
  for row in range(6):
    assert_same_row(ours, row, theirs)


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
  tiny, rows, _, run, fixed = subject
  mass = masses_in_torch(tiny, rows)
  threshold = float(np.sort(mass[:, 1])[1:3].mean())  # between two rows' shares on the middle rung
  expected = [int(np.argmax([*(row[:2] >= threshold), True])) for row in mass]
  assert len(set(expected)) > 1
  ours, _ = run(threshold)
  np.testing.assert_array_equal(ours.rungs[:5], expected)
  by_rung = [fixed(keep) for keep in KEEPS]
  for row, rung in enumerate(expected):
    assert_same_row(ours, row, by_rung[rung])
    assert [len(stage[row]) for stage in ours.kept] == list(KEEPS[rung])
  assert ours.tokens[5] == ours.tokens[4]


def test_neighbours_do_not_matter_and_nothing_is_compiled_again(subject):
  _, _, inputs, run, _ = subject
  threshold = 0.6
  whole, generator = run(threshold)
  compiled = generator.num_programs
  order = [3, 0, 4, 1]
  some = jax.tree.map(lambda x: np.asarray(x)[order], inputs)
  again = generator(some, order)
  for place, row in enumerate(order):
    assert again.tokens[place] == whole.tokens[row] and again.rungs[place] == whole.rungs[row]
    np.testing.assert_allclose(again.logits[place], whole.logits[row], atol=1e-4)
  assert generator.num_programs <= compiled + 2 * len(KEEPS)
  settled = generator.num_programs
  generator(inputs, [0, 1, 2, 3, 4, 4])
  generator(some, order)
  assert generator.num_programs == settled


def test_on_several_devices(checkpoints, images, tmp_path):
  tiny = checkpoints("clip_mha")
  _, padded, ids = rows_of(tiny, images)
  inputs = Inputs(**tiny_checkpoints.pad_batch(padded, SLOTS))
  results = []
  for mesh in ({}, {"data": 2, "tensor": 2}):
    opened = checkpoint.open_checkpoint(str(tiny.directory), cache_dir=tmp_path)
    model = opened.restore(dtype=jnp.float32, mesh=sharding.make_mesh(**mesh))
    generator = AdaptiveGenerator(
      model, ladder_of("clip_mha", 0.6), batch_size=BATCH, num_batches=NUM_BATCHES, max_new_tokens=NEW, ignore_eos=True
    )
    results.append(generator(inputs, ids))
  np.testing.assert_array_equal(results[0].rungs, results[1].rungs)
  assert results[0].tokens == results[1].tokens


@pytest.mark.parametrize(
  "keeps, threshold, message",
  [
    (((4, 2),), 0.5, "at least two rungs"),
    (((8, 3), (4, 2)), 0.5, "rungs must ascend, but 4/2 follows 8/3"),
    (((4, 3), (8, 2)), 0.5, "rungs must ascend"),
    (((4, 2), (8, 3)), 0.0, "threshold must be above 0"),
    (((4, 2), (8, 3)), 1.5, "threshold must be above 0"),
  ],
)
def test_what_is_no_ladder(keeps, threshold, message):
  with pytest.raises(ValueError, match=message):
    Ladder(tuple(rung_of("clip_mha", keep) for keep in keeps), threshold)
