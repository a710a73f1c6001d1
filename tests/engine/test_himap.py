"""HiMAP against the slow reference, float32: kept sets, logits, decoding from the pruned cache, invariances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_himap
import tiny_checkpoints
from tiny_checkpoints import PROMPTS

from himap_jax import GenerationConfig, InputConfig, Schedule, generate
from himap_jax.engine.engine import Engine
from himap_jax.engine.prefill import prefill

NUM_SLOTS = 128
NUM_NEW = 10

# name, layers, keep
MHA = ("clip_mha", (2, 4), (8, 4))
FIRST_TO_LAST = ("clip_mha", (1, 5), (14, 3))
TIED_GQA = ("clip_gqa_tied", (1, 3), (9, 5))
CONSECUTIVE = ("siglip", (2, 3), (12, 11))
ONE_KEY_HEAD = ("dinov2", (2, 4), (12, 6))
WINDOW_FROM_LAYER_3 = ("qwen2", (2, 4), (8, 4))
QWEN3, GEMMA = ("qwen3", (1, 3), (9, 4)), ("gemma", (1, 3), (12, 5))

jitted_prefill = jax.jit(
  lambda model, inputs, keys, schedule: prefill(model.bind(), inputs, keys, schedule), static_argnums=3
)


def run_prefill(loaded, rows, schedule, num_slots=NUM_SLOTS):
  batch = jax.tree.map(jnp.asarray, tiny_checkpoints.pad_batch(rows, num_slots))
  keys = jax.random.split(jax.random.key(0), len(rows))
  return jitted_prefill(loaded.model, batch, keys, schedule)


def assert_close(actual, expected, share):
  """Within `share` of the largest logit: the same mathematics in two programs, which XLA fuses differently."""
  np.testing.assert_allclose(actual, expected, atol=share * np.abs(expected).max(), rtol=0)


@pytest.mark.sampled
@pytest.mark.parametrize(
  "name, prune_layers, keep", [MHA, FIRST_TO_LAST, CONSECUTIVE, WINDOW_FROM_LAYER_3, QWEN3, GEMMA]
)
def test_prefill_is_the_reference(name, prune_layers, keep, checkpoints, loaded, images):
  tiny = checkpoints(name)
  rows = tiny.rows(images)
  result = run_prefill(loaded(name), rows, loaded(name).schedule("himap", prune_layers, keep))
  assert result.logits.dtype == jnp.float32
  for index, row in enumerate(rows):
    expected = reference_himap.forward(tiny.model, *row, prune_layers=prune_layers, keep=keep)
    assert expected.margin > 1e-5, "scores so close that rounding decides; draw other weights"
    assert [tuple(stage[index].tolist()) for stage in result.kept] == list(expected.kept)
    np.testing.assert_allclose(result.logits[index], expected.logits[-1], atol=1e-4, rtol=0)


def test_cache_holds_what_was_kept_at_its_original_position(checkpoints, loaded, images):
  name, prune_layers, keep = MHA
  tiny = checkpoints(name)
  rows = tiny.rows(images)
  result = run_prefill(loaded(name), rows, loaded(name).schedule("himap", prune_layers, keep))
  num_layers = tiny.model.config.text_config.num_hidden_layers
  borders = (0, *prune_layers, num_layers)
  assert [len(cache.keys) for cache in result.caches] == np.diff(borders).tolist()
  dropped = [0, *(tiny.num_image_tokens - count for count in keep)]
  assert [cache.order.shape[1] for cache in result.caches] == [NUM_SLOTS - count for count in dropped]
  for index, (input_ids, _) in enumerate(rows):
    image = (input_ids == tiny.model.config.image_token_id).nonzero()[:, 0].numpy()
    text = np.setdiff1d(np.arange(len(input_ids)), image)
    for cache, kept in zip(result.caches, (range(tiny.num_image_tokens), *result.kept), strict=True):
      kept = np.asarray(kept if isinstance(kept, range) else kept[index])
      order = np.asarray(cache.order[index])
      expected = np.sort(np.concatenate([text, image[kept]]))
      np.testing.assert_array_equal(order[: len(expected)], expected)
      assert (order[len(expected) :] >= NUM_SLOTS).all(), "an unused slot is visible to some query"


def test_keeping_every_token_is_not_pruning(checkpoints, loaded, images):
  name = "siglip"
  tiny = checkpoints(name)
  rows = tiny.rows(images)
  everything = loaded(name).schedule("himap", (1, 3), (tiny.num_image_tokens,) * 2)
  pruned = run_prefill(loaded(name), rows, everything)
  plain = run_prefill(loaded(name), rows, Schedule())
  assert plain.kept == ()
  for stage in pruned.kept:
    np.testing.assert_array_equal(stage, np.tile(np.arange(tiny.num_image_tokens), (len(rows), 1)))
  assert_close(pruned.logits, plain.logits, 1e-6)


@pytest.mark.sampled
@pytest.mark.parametrize("name, prune_layers, keep", [TIED_GQA, ONE_KEY_HEAD])
def test_decoding_is_rerunning_the_pruned_sequence(name, prune_layers, keep, checkpoints, loaded, images):
  tiny = checkpoints(name)
  answers = generate(
    loaded(name, batch_size=len(PROMPTS)),
    images,
    [prompt.removeprefix("<s>") for prompt in PROMPTS],
    schedule=loaded(name).schedule("himap", prune_layers, keep),
    generation=GenerationConfig(NUM_NEW, ignore_eos=True),
    inputs=InputConfig("<image>{question}", (112,), len(PROMPTS)),
  )
  for image, prompt, answer in zip(images, PROMPTS, answers, strict=True):
    row = tiny.encode(image, "<s>" + prompt.removeprefix("<s>"))
    expected = reference_himap.generate(tiny.model, *row, prune_layers=prune_layers, keep=keep, max_new_tokens=NUM_NEW)
    expected.assert_is(answer.token_ids, answer.kept, answer.first_logits)


def row_of(result, index):
  return result.tokens[index], [stage[index] for stage in result.kept]


# A row's answer, kept sets and logits are its own: whatever shares its batch, however much padding follows, whatever
# the padding holds.


@pytest.fixture(scope="module")
def run(loaded):
  """Runs encoded rows as one batch; programs are compiled once for each shape."""
  name, prune_layers, keep = MHA
  schedule = loaded(name).schedule("himap", prune_layers, keep)
  engines = {}

  def run(rows, num_slots=NUM_SLOTS, padding=0):
    if len(rows) not in engines:
      model = loaded(name, batch_size=len(rows)).model
      engines[len(rows)] = Engine(model, schedule, GenerationConfig(NUM_NEW, ignore_eos=True))
    return engines[len(rows)](tiny_checkpoints.pad_batch(rows, num_slots, padding), range(len(rows)))

  return run


@pytest.fixture(scope="module")
def rows(checkpoints, images):
  return checkpoints(MHA[0]).rows(images)


@pytest.fixture(scope="module")
def expected(run, rows):
  return run(rows)


def test_order_does_not_matter(run, rows, expected):
  actual = run(rows[::-1])
  for index in range(len(rows)):
    assert row_of(actual, -1 - index) == row_of(expected, index)
    np.testing.assert_array_equal(actual.logits[-1 - index], expected.logits[index])


def test_batch_mates_do_not_matter(run, rows, expected):
  for index in range(len(rows)):
    actual = run([rows[index]] * len(rows))
    for copy in range(len(rows)):
      assert row_of(actual, copy) == row_of(expected, index)
      assert_close(actual.logits[copy], expected.logits[index], 1e-5)


def test_the_bucket_does_not_matter(run, rows, expected):
  actual = run(rows, num_slots=NUM_SLOTS + 67)
  for index in range(len(rows)):
    assert row_of(actual, index) == row_of(expected, index)
  assert_close(actual.logits, expected.logits, 1e-5)


def test_padding_does_not_matter(run, rows, expected):
  actual = run(rows, padding=77)
  assert (actual.tokens, actual.kept) == (expected.tokens, expected.kept)
  np.testing.assert_array_equal(actual.logits, expected.logits)
