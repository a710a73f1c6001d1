"""RESTORE (arXiv 2606.01711) against transformers' layers with a bias on their attention, float32."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_himap
import reference_restore
import tiny_checkpoints
import torch

from himap_jax import GenerationConfig, InputConfig, Schedule
from himap_jax import generate as answer
from himap_jax.engine.engine import Engine
from himap_jax.engine.prefill import prefill
from himap_jax.engine.programs import method_parameters
from himap_jax.inputs import IMAGE, Calibration
from himap_jax.model.decoder import Decoder

NUM_SLOTS = 112
NUM_NEW = 5
N = 16

# name, layers, keep
MHA = ("clip_mha", (2, 4), (8, 4))
# The second stage is scored with the attention of the first layer after the first stage.
NEXT_TO_EACH_OTHER = ("clip_mha", (3, 4), (8, 4))
WINDOW = ("mistral", (2, 4), (8, 4))
HALF_ROTATED = ("phi3", (1, 3), (9, 5))


@pytest.fixture(scope="module")
def rows(checkpoints, images):
  return checkpoints(MHA[0]).rows(images)


def gain_of(decoder, image, stages, num_prompt):
  """What logits gain in a layer: `stages` are (layer, image tokens before it, image tokens after it)."""
  dim = decoder.layers[0].self_attn.head_dim
  theta = torch.zeros(dim // 2, dtype=torch.float64)
  theta[: len(decoder.rotary_emb.inv_freq)] = decoder.rotary_emb.inv_freq.double()

  def gain(layer, positions):
    passed = [stage for stage in stages if stage[0] <= layer]
    if not passed:
      return torch.zeros(len(positions), len(positions))
    first, before, after = passed[-1]
    closeness = reference_restore.closeness(positions[:, None].double() * theta)
    count = before / after if first == layer else 1
    return reference_restore.gain(closeness, torch.isin(positions, image), positions < num_prompt, count)

  return gain


def gain_for(tiny, row, prune_layers, keep):
  input_ids, pixels = row
  _, image = reference_himap.image_embeddings(tiny.model, input_ids, pixels)
  counts = (len(image), *keep)
  stages = list(zip(prune_layers, counts, keep, strict=False))
  return gain_of(tiny.model.model.language_model, image, stages, len(input_ids))


def generate(model, rows, schedule):
  engine = Engine(model.model, schedule, GenerationConfig(NUM_NEW, ignore_eos=True))
  return engine(tiny_checkpoints.pad_batch(rows, NUM_SLOTS), range(len(rows)))


def assert_tokens(tiny, row, prune_layers, kept, gain, result, index):
  """Logits, and decoding as running the pruned sequence again, where new tokens gain nothing by distance."""
  input_ids, pixels = row
  for number, token in enumerate(result.tokens[index]):
    longer = torch.cat([input_ids, torch.tensor(result.tokens[index][:number], dtype=torch.long)])
    found = reference_himap.forward(
      tiny.model, longer, pixels, prune_layers=prune_layers, keep=(), frozen=kept, gain=gain
    )
    best = found.logits[-1].topk(2)
    assert best.values[0] - best.values[1] > 1e-3, "so close that rounding decides; draw other weights"
    assert token == best.indices[0]
    if number == 0:
      np.testing.assert_allclose(result.logits[index], found.logits[-1], atol=1e-4, rtol=0)


@pytest.mark.sampled
@pytest.mark.parametrize("name, prune_layers, keep", [NEXT_TO_EACH_OTHER, WINDOW, HALF_ROTATED])
def test_inside_the_decoder(name, prune_layers, keep, checkpoints, loaded, images):
  """Kept sets too: later stages read calibrated attention."""
  tiny = checkpoints(name)
  rows, model = tiny.rows(images), loaded(name, batch_size=4)
  result = generate(model, rows, model.schedule("himap", prune_layers, keep, restore=True))
  for index, row in enumerate(rows):
    gain = gain_for(tiny, row, prune_layers, keep)
    expected = reference_himap.forward(tiny.model, *row, prune_layers=prune_layers, keep=keep, gain=gain)
    assert expected.margin > 1e-5, "scores so close that rounding decides; draw other weights"
    assert [tuple(stage[index]) for stage in result.kept] == list(expected.kept)
    assert_tokens(tiny, row, prune_layers, expected.kept, gain, result, index)


@pytest.mark.sampled
@pytest.mark.parametrize(
  "name, method, prune_layers, keep, restore",
  [
    ("mistral", "fastervlm", (0,), (7,), True),
    ("clip_mha", "fastervlm+himap", (0, 2, 4), (12, 8, 4), True),
    ("mistral", "fastervlm", (0,), (7,), False),
    ("clip_mha", "fastervlm+himap", (0, 2, 4), (12, 8, 4), False),
  ],
)
def test_before_the_decoder(name, method, prune_layers, keep, restore, checkpoints, loaded, images):
  """The tokens that are left keep their positions in the whole prompt; without RESTORE nothing else changes."""
  tiny = checkpoints(name)
  rows, model = tiny.rows(images), loaded(name, batch_size=4)
  options = {"restore": True} if restore else {"keep_positions": True}
  result = generate(model, rows, model.schedule(method, prune_layers, keep, **options))
  plain = model.schedule(method, prune_layers, keep)
  batch, keys = tiny_checkpoints.pad_batch(rows, NUM_SLOTS), jax.random.split(jax.random.key(0), len(rows))
  first = jax.jit(lambda model, *own: prefill(model.bind(), *own, plain).kept[0])(model.model, batch, keys)
  assert result.kept[0] == first.tolist()
  for index, row in enumerate(rows):
    kept = tuple(tuple(stage[index]) for stage in result.kept)
    gain = gain_for(tiny, row, prune_layers, keep) if restore else None
    assert_tokens(tiny, row, prune_layers, kept, gain, result, index)


def test_attention_in_the_next_layer(checkpoints, loaded, rows):
  """PyramidDrop's stages read what the next layer would be without them: calibrated by distance alone."""
  tiny, layers, keep = checkpoints(MHA[0]), (2, 3, 4), (11, 8, 4)
  decoder = tiny.model.model.language_model
  schedule = loaded(MHA[0]).schedule("pyramiddrop", layers, keep, restore=True)
  batch = jax.tree.map(jnp.asarray, tiny_checkpoints.pad_batch(rows, NUM_SLOTS))
  program = jax.jit(lambda model, *arguments: prefill(model.bind(), *arguments, schedule).kept)
  kept = program(loaded(MHA[0]).model, batch, jax.random.split(jax.random.key(0), len(rows)))
  for index, (input_ids, pixels) in enumerate(rows):
    with torch.no_grad():
      hidden, image = reference_himap.image_embeddings(tiny.model, input_ids, pixels)
      positions, stages, left = torch.arange(len(input_ids)), [], image
      gain = gain_of(decoder, image, stages, len(input_ids))
      for number, layer in enumerate(decoder.layers[:5]):
        if number in layers:
          count = keep[len(stages)]
          _, attention = reference_himap.run_layer(decoder, layer, hidden, positions, gain(number, positions))
          scores = attention[-1, torch.isin(positions, left)].sort(descending=True, stable=True)
          assert scores.values[count - 1] - scores.values[count] > 1e-6, "so close that rounding decides"
          stays = left[scores.indices[:count]].sort().values
          assert kept[len(stages)][index].tolist() == torch.searchsorted(image, stays).tolist()
          remains = ~torch.isin(positions, left) | torch.isin(positions, stays)
          hidden, positions = hidden[remains], positions[remains]
          stages.append((number, len(left), count))
          left = stays
        hidden, _ = reference_himap.run_layer(decoder, layer, hidden, positions, gain(number, positions))


@pytest.mark.parametrize(
  "method, layers, keep, expected",
  [("pyramiddrop", (2, 3, 4), (11, 8, 4), [(3, 2), (4, 3)]), ("himap", (3, 4), (8, 4), [(3, 3)])],
)
def test_layers_whose_attention_is_scored(method, layers, keep, expected, loaded, rows, monkeypatch):
  """The layer of the attention, and the first layer after the last stage, whose logits gain by count."""
  model, scored = loaded(MHA[0]), []
  gain = Decoder.gain

  def record(self, positions, layout, layer, slots):
    scored.append((layer, layout.calibration.layer))
    return gain(self, positions, layout, layer, slots)

  monkeypatch.setattr(Decoder, "gain", record)
  schedule = model.schedule(method, layers, keep, restore=True)
  batch = jax.tree.map(jnp.asarray, tiny_checkpoints.pad_batch(rows, NUM_SLOTS))
  keys = jax.random.split(jax.random.key(0), len(rows))
  jax.eval_shape(lambda model, *own: prefill(model.bind(), *own, schedule), model.model, batch, keys)
  assert scored == expected


def test_scores_gain_by_count_in_the_first_layer_alone(loaded, rows):
  model, layer = loaded(MHA[0]).model, 3
  batch = jax.tree.map(jnp.asarray, tiny_checkpoints.pad_batch(rows, NUM_SLOTS))
  is_left, count = batch.layout.kind == IMAGE, jnp.full(batch.layout.kind.shape, 0.7)
  layout = batch.layout.replace(calibration=Calibration(count, is_left, layer))
  slots = jnp.array([[30, 2]] * len(rows), jnp.int32)
  before, first, after = (
    model.bind().language_model.gain(batch.positions, layout, layer + step, slots) for step in (-1, 0, 1)
  )
  np.testing.assert_allclose(first - after, 0.7, atol=1e-6)
  np.testing.assert_array_equal(before, after)


@pytest.mark.sampled(of="restore")
def test_a_row_that_keeps_every_token_is_not_calibrated(loaded, rows):
  method, layers, model = "fastervlm+himap", (0, 2, 4), loaded(MHA[0], batch_size=4)
  everything = generate(model, rows, model.schedule(method, layers, (N,) * len(layers), restore=True))
  plain = generate(model, rows, Schedule())
  assert everything.tokens == plain.tokens
  np.testing.assert_allclose(everything.logits, plain.logits, atol=1e-5, rtol=0)


@pytest.mark.sampled(of="restore")
def test_a_prompt_without_pictures_is_answered_as_without_pruning(loaded, images):
  """In one call with others, in whose slots it is decoded."""
  model = loaded(MHA[0])
  schedule = model.schedule("himap", (2, 4), (8, 4), restore=True)

  def answers(schedule, pictures, questions):
    generation, inputs = GenerationConfig(NUM_NEW, ignore_eos=True), InputConfig("<image>{question}", (80,), 1)
    return answer(model, pictures, questions, schedule=schedule, generation=generation, inputs=inputs)

  together = answers(schedule, [[images[0]], []], ["What is it?", "Who are you?"])
  for found, expected in zip(
    together,
    [*answers(schedule, [[images[0]]], ["What is it?"]), *answers(Schedule(), [[]], ["Who are you?"])],
    strict=True,
  ):
    assert found.token_ids == expected.token_ids
    np.testing.assert_allclose(found.first_logits, expected.first_logits, atol=1e-5, rtol=0)


@pytest.mark.sampled(of="restore")
def test_rows_that_keep_different_counts_are_their_own(loaded, rows):
  """The same program on the rows in another order and with other padding gives every row what it had."""
  model, keys = loaded(MHA[0]).model, jax.random.split(jax.random.key(3), len(rows))
  schedule = loaded(MHA[0]).schedule("himap_adaptive", (2, 4), (12, 6), restore=True)
  program = jax.jit(lambda model, *arguments: prefill(model.bind(), *arguments[:2], schedule, arguments[2]))

  def run(rows, keys, padding):
    batch = tiny_checkpoints.pad_batch(rows, NUM_SLOTS, padding)
    return program(model, jax.tree.map(jnp.asarray, batch), keys, method_parameters(schedule))

  expected, reverse = run(rows, keys, 0), run(rows[::-1], keys[::-1], 9)
  np.testing.assert_allclose(expected.logits, reverse.logits[::-1], atol=1e-5, rtol=0)
  assert len({tuple((stage[row] >= 0).sum().item() for stage in expected.kept) for row in range(len(rows))}) > 1
  for row in range(len(rows)):
    for cache, before, after in zip(expected.caches[1:], (None, *expected.kept), expected.kept, strict=False):
      counts = N if before is None else int((before[row] >= 0).sum()), int((after[row] >= 0).sum())
      own = np.unique(np.asarray(cache.log_count[row])).tolist()
      np.testing.assert_allclose(own, sorted({0.0, math.log(counts[0] / counts[1])}), atol=1e-6)


def test_nothing_is_calibrated_unless_asked_for(loaded, rows):
  model = loaded(MHA[0])
  schedule = model.schedule("himap", (2, 4), (8, 4))
  batch = jax.tree.map(jnp.asarray, tiny_checkpoints.pad_batch(rows, NUM_SLOTS))
  keys = jax.random.split(jax.random.key(0), len(rows))
  state = jax.eval_shape(lambda model, *own: prefill(model.bind(), *own, schedule), model.model, batch, keys)
  assert all(cache.log_count is None for cache in state.caches)
  assert schedule != model.schedule("himap", (2, 4), (8, 4), restore=True)
