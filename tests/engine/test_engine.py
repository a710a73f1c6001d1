"""Slots: rows that share them, enter and leave at any time are answered as each alone; and what a turn does, by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from himap_jax import GenerationConfig, checkpoint
from himap_jax.engine import sharding, slots
from himap_jax.engine.batching import Batcher, ImageBucket
from himap_jax.engine.capacity import BatchSizes
from himap_jax.engine.compiled import CompiledPrograms
from himap_jax.engine.engine import Batch, Engine
from himap_jax.engine.pool import Request
from himap_jax.engine.prefill import PrefillState
from himap_jax.engine.sampling import Kind, RowSampling, Sampling
from himap_jax.engine.slots import Rows
from himap_jax.inputs import UNUSED_ORDER
from himap_jax.model.cache import SegmentCache

NAME, MOST = "dinov2_shrunk", 9
QUESTIONS = ("What is it?", "Why?", "A rather longer question than the others?", "<image> before the question?")


class Asked:
  """Questions about pictures, packed as the engine takes them."""

  def __init__(self, loaded, images, requests, *, image_free=(), buckets=(16, 64)):
    self.processor = loaded.prompts("<image>{question}:")
    self.requests = requests
    self.examples = []
    for index, _ in enumerate(requests):
      own = [] if index in image_free else [images[index % len(images)]]
      question = QUESTIONS[index % len(QUESTIONS)]
      self.examples.append(self.processor.prepare(own, question if own else question.replace("<image>", "")))
    sizes = {ImageBucket(*example.size) for example in self.examples}
    self.batcher = Batcher(512, self.processor.blank, sorted(sizes), buckets=buckets, max_new_tokens=MOST)

  def batches(self, batch_size):
    """All rows, by bucket, in their order."""
    bucket_of = [self.batcher.bucket(example) for example in self.examples]
    for bucket in dict.fromkeys(bucket_of):
      indices = [index for index, own in enumerate(bucket_of) if own == bucket]
      for first in range(0, len(indices), batch_size):
        group = indices[first : first + batch_size]
        packed = self.batcher.pack([self.examples[index] for index in group], bucket=bucket, batch_size=batch_size)
        yield Batch(packed, [self.requests[index] for index in group])


def answers(engine, batches):
  found = {row.request.key: row for turn in engine.answer(batches) for row in turn}
  assert not any(row.tokens == [] and row.is_finite for row in found.values())
  return found


@pytest.mark.sampled
@pytest.mark.parametrize(
  ("setting", "data"), [(("none", None, None), 1), (("himap", (2, 3), (8, 3)), 2)], ids=["none", "himap"]
)
def test_rows_that_share_slots_are_answered_as_each_alone(setting, data, loaded, images):
  """Every row has another length and sampling, some have no picture, and two buckets share the slots.

  The slots of a prompt's cache are a multiple of 128 there, several times as many as a short prompt has.
  """
  samplings = [Sampling(), Sampling(1.0), Sampling(0.8, 0.7), None]
  requests = [Request(f"row {n}", 1 + (5 * n) % MOST, samplings[n % 4]) for n in range(13)]
  model, alone = loaded(NAME, data), loaded(NAME, 1)
  schedule, generation = model.schedule(*setting), GenerationConfig(MOST, seed=3, ignore_eos=True)
  asked = Asked(model, images, requests, image_free=(5, 11))
  network = model.model.network
  kernels = dataclasses.replace(network.kernels, cache_multiple=lambda head_dim: 128)
  in_lanes = dataclasses.replace(model.model, network=dataclasses.replace(network, kernels=kernels))
  engine = Engine(in_lanes, schedule, generation, batch_sizes=BatchSizes(2 * data, data))
  found = answers(engine, asked.batches(data))
  single = Engine(alone.model, schedule, generation, batch_sizes=BatchSizes(1, 1))
  expected = answers(single, asked.batches(1))
  assert found.keys() == expected.keys() == {request.key for request in requests}
  for request in requests:
    own, other = found[request.key], expected[request.key]
    assert own.tokens == other.tokens and len(own.tokens) == request.max_new_tokens
    assert own.kept == other.kept
    np.testing.assert_allclose(own.logits, other.logits, atol=1e-4, rtol=0)
  assert engine.usage.row_steps == sum(request.max_new_tokens - 1 for request in requests)
  assert engine.usage.row_steps <= engine.usage.slot_steps


@pytest.mark.sampled(of="meshes")
def test_rows_that_share_slots_of_eight_devices(checkpoints, loaded, images, tmp_path):
  """Rows over four devices, heads over two: tokens are those of each row alone, and a second job compiles nothing."""
  requests = [Request(f"row {n}", 1 + (5 * n) % MOST, Sampling(0.8, 0.7) if n > 5 else None) for n in range(11)]
  directory, mesh = str(checkpoints(NAME).directory), sharding.make_mesh(data=4, tensor=2)
  model = checkpoint.load(directory, dtype=jnp.float32, cache_dir=tmp_path, mesh=mesh)
  alone, generation = loaded(NAME, 1), GenerationConfig(MOST, seed=3, ignore_eos=True)
  asked, schedule = Asked(model, images, requests, buckets=(64,)), model.schedule("himap", (2, 3), (8, 3))
  engine = Engine(model.model, schedule, generation, batch_sizes=BatchSizes(8, 4))
  found = answers(engine, asked.batches(4))
  single = Engine(alone.model, schedule, generation, batch_sizes=BatchSizes(1, 1))
  expected = answers(single, asked.batches(1))
  for request in requests:
    own, other = found[request.key], expected[request.key]
    assert own.tokens == other.tokens and len(own.tokens) == request.max_new_tokens
    assert own.kept == other.kept
  count = engine.programs.num_programs
  again = answers(engine, reversed(list(asked.batches(4))))
  assert {key: row.tokens for key, row in again.items()} == {key: row.tokens for key, row in found.items()}
  assert engine.programs.num_programs == count


def test_slots_are_counted_with_the_program_of_their_rows(loaded, images, monkeypatch):
  """Choosing among the likeliest tokens takes more memory: slots for greedy rows are not used for such rows."""
  measured, memory_of = [], CompiledPrograms.memory_with_slots

  def record(self, kind, batch, num_slots):
    measured.append(kind)
    return memory_of(self, kind, batch, num_slots)

  monkeypatch.setattr(CompiledPrograms, "memory_with_slots", record)
  model, samplings = loaded(NAME), (Sampling(), Sampling(), Sampling(0.8, 0.7), Sampling(), Sampling(1.0))
  requests = [Request(n, 5, own) for n, own in enumerate(samplings)]
  asked, schedule = Asked(model, images, requests, buckets=(64,)), model.schedule("none", None, None)
  generation = GenerationConfig(MOST, seed=3, ignore_eos=True)
  found = answers(Engine(model.model, schedule, generation, batch_sizes=BatchSizes(2, 1)), asked.batches(1))
  assert measured == [Kind.GREEDY, Kind.NUCLEUS]
  for request, batch in zip(requests, asked.batches(1), strict=True):
    (alone,) = answers(Engine(model.model, schedule, generation), [batch]).values()
    assert alone.tokens == found[request.key].tokens


def test_later_slots_are_for_all_kinds_so_far(loaded, images, monkeypatch):
  made, memory_of, model = [], CompiledPrograms.memory_with_slots, loaded(NAME)
  monkeypatch.setattr(
    CompiledPrograms, "memory_with_slots", lambda self, kind, *own: made.append(kind) or memory_of(self, kind, *own)
  )
  asked = Asked(model, images, [Request(0, 2, Sampling(0.8, 0.7)), Request(1, 2), Request(2, 2)])  # the last is longer
  engine = Engine(model.model, model.schedule("none", None, None), GenerationConfig(MOST), batch_sizes=BatchSizes(1, 1))
  assert len(answers(engine, asked.batches(1))) == 3
  assert len(made) > 1 and set(made) == {Kind.NUCLEUS}


def test_slots_are_used_again_at_once(loaded, images):
  """Steps are those of an exact simulation: decoding stops when a batch can enter."""
  limits = [9, 2, 5, 3, 1, 4, 2, 6]
  model = loaded(NAME)
  asked = Asked(model, images, [Request(n, limit) for n, limit in enumerate(limits)], buckets=(64,))
  engine = Engine(
    model.model,
    model.schedule("none", None, None),
    GenerationConfig(MOST, ignore_eos=True),
    batch_sizes=BatchSizes(2, 1),
  )
  order = [request for batch in asked.batches(1) for request in batch.requests]
  found = answers(engine, asked.batches(1))
  assert [len(found[n].tokens) for n in range(len(limits))] == limits
  waiting, left, steps = [request.max_new_tokens for request in order], [0, 0], 0
  while waiting or any(left):
    if waiting and 0 in left:
      left[left.index(0)] = waiting.pop(0) - 1
    while any(left) and not (waiting and 0 in left):
      left, steps = [max(0, own - 1) for own in left], steps + 1
  assert engine.usage.slot_steps == 2 * steps


def test_programs_do_not_depend_on_the_rows(loaded, images):
  """One prefill and one entrance for every bucket and one decode program, however many rows there are."""
  model = loaded(NAME)
  schedule = model.schedule("himap", (2, 3), (16, 11))
  engine = Engine(model.model, schedule, GenerationConfig(MOST), batch_sizes=BatchSizes(4, 2))
  answers(
    engine,
    sorted(Asked(model, images, [Request(n) for n in range(9)], buckets=(40, 64)).batches(2), key=_longest_first),
  )
  assert engine.programs.num_programs == 5
  answers(
    engine,
    sorted(
      Asked(model, images, [Request(n, n + 1) for n in range(8)], buckets=(40, 64)).batches(2), key=_longest_first
    ),
  )
  assert engine.programs.num_programs == 5


def _longest_first(batch):
  return -batch.inputs.tokens.shape[1]


def test_longer_prompts_after_shorter_ones_get_other_slots(loaded, images):
  model = loaded(NAME)
  schedule, generation = model.schedule("himap", (2, 3), (16, 11)), GenerationConfig(MOST)
  asked = Asked(model, images, [Request(n) for n in range(8)], buckets=(40, 64))
  first, second = (
    answers(Engine(model.model, schedule, generation, batch_sizes=BatchSizes(4, 2)), batches)
    for batches in (sorted(asked.batches(2), key=_longest_first), sorted(asked.batches(2), key=_longest_first)[::-1])
  )
  assert {key: row.tokens for key, row in first.items()} == {key: row.tokens for key, row in second.items()}


def test_a_prefill_that_needs_the_memory_of_the_slots_waits_until_they_are_empty(loaded, images, monkeypatch):
  """The answers are the same, and those of a batch come before the next begins."""
  limits = [9, 2, 5, 3, 1, 4, 2, 6]
  model = loaded(NAME)
  asked = Asked(model, images, [Request(n, limit) for n, limit in enumerate(limits)], buckets=(64,))
  sizes, generation = BatchSizes(4, 2), GenerationConfig(MOST, ignore_eos=True)
  expected = answers(Engine(model.model, model.schedule("none"), generation, batch_sizes=sizes), asked.batches(2))
  engine = Engine(model.model, model.schedule("none"), generation, batch_sizes=sizes)
  monkeypatch.setattr(engine.capacity, "fits_beside_slots", lambda prefill: False)
  found = answers(engine, asked.batches(2))
  assert [key // 2 for key in found] == [0, 0, 1, 1, 2, 2, 3, 3] != [key // 2 for key in expected]
  assert all(found[key].tokens == row.tokens for key, row in expected.items())


def test_answers_that_are_complete_leave_their_slots(loaded, images):
  """A row ends with the first token that completes it, the others go on."""
  model = loaded(NAME)
  schedule, generation = model.schedule("none", None, None), GenerationConfig(MOST, ignore_eos=True)
  requests = [Request(n) for n in range(7)]
  engine = Engine(model.model, schedule, generation, batch_sizes=BatchSizes(3, 1))
  whole = answers(engine, Asked(model, images, requests).batches(1))
  lengths = [1, 3, 9, 2, 5, 9, 4]
  stopped = [
    dataclasses.replace(own, is_complete=lambda tokens, most=most: len(tokens) >= most)
    for own, most in zip(requests, lengths, strict=True)
  ]
  found = answers(engine, Asked(model, images, stopped).batches(1))
  for n, length in enumerate(lengths):
    assert found[n].tokens == whole[n].tokens[:length]


@pytest.mark.parametrize("where", ["picture", "answer"])
def test_rows_that_are_not_finite_end_and_change_no_later_row(where, loaded, images):
  """All rows use one slot after each other. A picture is NaN, or the embedding of a token of one row's answer alone."""
  model = loaded(NAME)
  schedule, generation = model.schedule("himap", (2, 3), (8, 3)), GenerationConfig(MOST, ignore_eos=True)
  asked = Asked(model, images, [Request(n) for n in range(4)], buckets=(64,))
  engine = Engine(model.model, schedule, generation, batch_sizes=BatchSizes(1, 1))
  whole, bad, params = answers(engine, asked.batches(1)), 1, model.model.params
  assert all(row.is_finite for row in whole.values())
  if where == "picture":
    pictures = asked.examples[bad].images
    nan = pictures.replace(pixels=np.full_like(pictures.pixels, np.nan))
    asked.examples[bad] = dataclasses.replace(asked.examples[bad], images=nan)
    num_tokens = 0
  else:
    read = {token for n, row in whole.items() for token in row.tokens if n != bad}
    read |= {token for example in asked.examples for token in example.tokens.tolist()}
    index, token = [(i, token) for i, token in enumerate(whole[bad].tokens[:-1]) if token not in read][-1]
    assert index > 1 and token not in whole[bad].tokens[:index]  # later rows do not overwrite what it writes at once
    num_tokens = index + 1  # the next one's logits are the first that are not finite
    params = jax.tree_util.tree_map_with_path(
      lambda path, x: x.at[token].set(jnp.nan) if "embed_tokens" in jax.tree_util.keystr(path) else x, params
    )
  poisoned = Engine(dataclasses.replace(model.model, params=params), schedule, generation, batch_sizes=BatchSizes(1, 1))
  found = answers(poisoned, asked.batches(1))
  assert list(found) == list(whole) == list(range(4))
  assert [row.is_finite for row in found.values()] == [n != bad for n in range(4)]
  assert found[bad].tokens == whole[bad].tokens[:num_tokens]
  for n in set(whole) - {bad}:
    assert found[n].tokens == whole[n].tokens
  if where == "answer":  # complete before, in the same turn
    asked.requests[bad] = Request(bad, is_complete=lambda tokens: len(tokens) == num_tokens - 1)
    row = answers(poisoned, asked.batches(1))[bad]
    assert row.is_finite and row.tokens == whole[bad].tokens[: num_tokens - 1]


def test_rows_that_only_fill_a_batch_take_no_slots(loaded, images):
  model = loaded(NAME)
  engine = Engine(
    model.model, model.schedule("none", None, None), GenerationConfig(4, ignore_eos=True), batch_sizes=BatchSizes(4, 4)
  )
  found = answers(engine, Asked(model, images, [Request("only")]).batches(4))
  assert list(found) == ["only"] and engine.usage.row_steps == 3


def test_fewer_slots_than_rows_of_a_batch(loaded, images):
  model = loaded(NAME)
  engine = Engine(model.model, model.schedule("none", None, None), GenerationConfig(4), batch_sizes=BatchSizes(2, 4))
  with pytest.raises(ValueError, match="4 rows do not fit into 2 slots"):
    answers(engine, Asked(model, images, [Request(0)]).batches(4))


@pytest.mark.parametrize("num_shards", [1, 2])
def test_put_is_the_slow_one(num_shards):
  """Rows that stay enter the first free slots of their device, in order; all else is as it was."""
  rng = np.random.default_rng(0)
  num_slots, num_rows, room = 8, 4, 6

  def draw(*shape):
    return rng.normal(size=shape).astype(np.float32)

  prompts = PrefillState(
    logits=draw(num_rows, 5),
    caches=(
      SegmentCache(
        (draw(num_rows, 2, 4, 3),), (draw(num_rows, 2, 3, 4),), np.arange(16).reshape(4, 4).astype(np.int32)
      ),
    ),
    next_position=np.arange(num_rows, dtype=np.int32) + 70,
    next_order=np.arange(num_rows, dtype=np.int32) + 90,
    kept=(),
  )
  large = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((1, *(room if size == 4 else size for size in x.shape[1:])), x.dtype), prompts
  )
  shapes = slots.shapes(large, num_slots, 7, jnp.float32)
  before = jax.tree.map(lambda x: rng.integers(0, 9, x.shape).astype(x.dtype), shapes)
  active = np.array([True, False, True, False, False, True, False, False])
  before = before.replace(active=active)
  rows = Rows(
    np.arange(num_rows, dtype=np.uint32), np.array([3, 1, 5, 2], np.int32), RowSampling(draw(num_rows), draw(num_rows))
  )
  first, ends = np.array([11, 12, 13, 14], np.int32), np.array([False, False, False, True])
  after, entered = jax.jit(slots.put, static_argnums=4)(before, prompts, rows, (first, ends), num_shards)
  stays = [0, 2]  # the second may have one token, the last ended with its first
  free = {1: {0: 1, 2: 3}, 2: {0: 1, 2: 4}}[num_shards]
  per_shard = num_slots // num_shards
  assert entered.place.tolist() == [free[row] % per_shard if row in stays else -1 for row in range(num_rows)]
  expected = jax.tree.map(np.array, before)
  (cache,) = expected.caches
  for row in stays:
    slot = free[row]
    for own, given in ((cache.keys[0], prompts.caches[0].keys[0]), (cache.values[0], prompts.caches[0].values[0])):
      own[slot] = 0
      own[slot][tuple(slice(size) for size in given.shape[1:])] = given[row]
    cache.order[slot] = [*prompts.caches[0].order[row], *[UNUSED_ORDER] * (room - 4)]
    expected.new.order[slot] = UNUSED_ORDER
    for own in (*expected.new.keys, *expected.new.values):
      own[slot] = 0
    expected.rows.seeds[slot], expected.rows.limits[slot] = rows.seeds[row], rows.limits[row]
    expected.rows.sampling.temperature[slot] = rows.sampling.temperature[row]
    expected.rows.sampling.top_p[slot] = rows.sampling.top_p[row]
    expected.last[slot], expected.num_tokens[slot], expected.active[slot] = first[row], 1, True
    expected.position[slot], expected.order[slot] = prompts.next_position[row], prompts.next_order[row]
  jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, after), expected)
