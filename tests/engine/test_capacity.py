"""Batch sizes that are chosen from memory: the search, what programs take by hand, and real programs on real devices."""

import dataclasses
import types
import unittest.mock

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from himap_jax import GenerationConfig
from himap_jax.engine import capacity, compiled, sharding
from himap_jax.engine.batching import Batcher, ImageBucket
from himap_jax.engine.capacity import PROGRAMS, BatchSizes, Capacity, Memory, most_that_fit, needed
from himap_jax.engine.engine import Batch
from himap_jax.engine.pool import Request
from himap_jax.errors import UserError
from himap_jax.model.kernels import xla
from himap_jax.model.network import Model

KERNELS = dataclasses.replace(xla.KERNELS, prefill_tokens=4096, most_slots=1000)


def capacity_of(num_shards, sizes, *, weights=100, **room):
  """The capacity of a model whose weights take so many bytes on each of its devices."""
  mesh = Mesh(np.array(jax.devices()[:num_shards]).reshape(num_shards, 1), ("data", "tensor"))
  own = jax.ShapeDtypeStruct((weights,), np.int8, sharding=NamedSharding(mesh, PartitionSpec()))
  return Capacity(Model({"own": own}, types.SimpleNamespace(kernels=KERNELS)), sizes, **room)


@pytest.mark.parametrize("unit", [1, 4])
@pytest.mark.parametrize("room", [50, 150, 1000, 1733, 10**6])
@pytest.mark.parametrize("refused", [400, 10**6], ids=["the compiler refuses many", "it refuses none"])
def test_the_most_that_fit(unit, room, refused):
  asked = []

  def taken(count):
    asked.append(count)
    return None if count >= refused else 100 + 7 * count

  found = most_that_fit(taken, 1000, room, unit)
  most = max(0, min(1000, refused - 1, (room - 100) // 7)) // unit * unit
  assert all(count % unit == 0 for count in asked) and len(asked) == len(set(asked)) <= 14
  assert most - max(unit, most * capacity.TOLERANCE) < found <= most
  assert (found == 0) == (most == 0)


def test_what_is_in_memory_while_a_program_runs():
  """Weights of 100, of which decoding reads 70, ten slots of 5, a waiting batch of 8 and inputs of 3."""
  programs = {"prefill": Memory(103, 40, 8), "enter": Memory(58, 2, 0), "decode": Memory(120, 6, 0)}
  assert needed(programs, 100) == {"slots": 50, "prefill": 109, "enter": 60, "decode": 64}
  programs["prefill"] = Memory(33, 40, 8)  # of text alone, which reads less than all weights
  assert needed(programs, 100)["prefill"] == 106


@pytest.mark.parametrize("bound", PROGRAMS)
def test_slots_are_those_that_all_programs_can(bound):
  """Weights of 100, slots of 10 each, batches of 8; the room is filled by another program each time."""

  def memory(count):
    return {
      "prefill": Memory(100, 500 if bound == "prefill" else 0, 8),
      "enter": Memory(8 + 10 * count, 10 * count if bound == "enter" else 0, 0),
      "decode": Memory(100 + 10 * count, 30 * count if bound == "decode" else 0, 0),
    }

  found = capacity_of(1, BatchSizes(), room=1312).slots(4, 10, memory)
  assert found == {"prefill": (1312 - 516) // 10, "enter": (1312 - 8) // 20, "decode": (1312 - 8) // 40}[bound]


@pytest.mark.parametrize(
  ("sizes", "num_slots", "expected"),
  [
    (BatchSizes(), 700, 4),  # 5 would be 3,500 of 4,096 tokens
    (BatchSizes(), 5000, 1),
    (BatchSizes(num_rows=20), 700, 2),
    (BatchSizes(decode=16), 700, 2),
    (BatchSizes(decode=16, prefill=5), 700, 5),
    (BatchSizes(decode=4, prefill=5), 700, 4),
  ],
)
def test_rows_of_a_prefill(sizes, num_slots, expected):
  chosen = capacity_of(1, sizes, room=10**6).prefill_rows(num_slots, lambda count: Memory(0, count, 0))
  assert chosen == expected


def test_a_prefill_has_a_part_of_the_memory():
  chosen = capacity_of(2, BatchSizes(), room=1000)
  assert chosen.prefill_rows(700, lambda count: Memory(100, 60 * count, 10 * count)) == 2  # of 8; 250 bytes are three
  programs = {"prefill": Memory(100, 60, 20), "enter": Memory(820, 0, 0), "decode": Memory(900, 0, 0)}
  assert chosen.slots(2, 1, lambda count: programs) == 2000
  assert chosen.prefill_rows(700, lambda count: Memory(100, 50 * count, 0)) == 4  # beside slots of 800
  assert chosen.chosen == BatchSizes(2000, 4)
  assert chosen.describe().startswith("2000 slots for decoding, 4 rows in a prefill; ")


def test_given_sizes_are_the_most():
  """Multiples of the shards, and fewer where the room does not hold them."""
  own = capacity_of(4, BatchSizes(decode=6, prefill=3), room=1000)
  prefill = Memory(100, 10, 20)
  programs = {"prefill": prefill, "enter": Memory(20, 0, 0), "decode": Memory(100, 0, 0)}
  assert own.prefill_rows(700, lambda count: prefill) == 4
  assert own.slots(4, 1, lambda count: programs | {"enter": Memory(20 + 10 * count, 0, 0)}) == 8
  assert own.slots(4, 1, lambda count: programs | {"enter": Memory(20 + 120 * count, 0, 0)}) == 4
  long = capacity_of(2, BatchSizes(decode=9, prefill=8), room=1000)
  assert long.prefill_rows(9000, lambda count: Memory(100, 100 * count, 50 * count)) == 4  # 5 take 200 each


def test_a_room_that_holds_no_row():
  own = capacity_of(2, BatchSizes(), room=capacity.GIB)
  message = (
    "a prompt of 700 tokens, padding included, needs 3 GiB .* 1 GiB are free .*; fewer pictures, --max_image_tokens"
  )
  with pytest.raises(UserError, match=message):
    own.prefill_rows(700, lambda count: Memory(0, count * capacity.GIB // 2, count * capacity.GIB // 2))
  with pytest.raises(UserError, match="needs more of a device's memory"):
    own.prefill_rows(700, lambda count: None)
  assert own.slots(2, 100, lambda count: None) == 2 and not own.fits_beside_slots(Memory(100, 1, 0))


def test_what_fits_beside_slots():
  own = capacity_of(1, BatchSizes(), room=1000)
  assert own.fits_beside_slots(Memory(100, 10**6, 0))  # there are none
  programs = {"prefill": Memory(100, 60, 20), "enter": Memory(720, 0, 0), "decode": Memory(800, 0, 0)}
  own.slots(2, 1, lambda count: programs)
  assert own.fits_beside_slots(Memory(110, 250, 40)) and not own.fits_beside_slots(Memory(110, 251, 40))
  assert own.fits_beside_slots(Memory(30, 260, 40)) and not own.fits_beside_slots(Memory(30, 261, 40))  # of text alone


@pytest.mark.sampled
@pytest.mark.parametrize("data", [1, 2])
def test_an_engine_takes_as_many_slots_as_its_room_holds(data, loaded, images, monkeypatch):
  """And answers as one with given sizes; the programs that were asked about are those that run."""
  model = loaded("clip_mha", data)
  processor, schedule = model.prompts(), model.schedule("himap", (1, 2), (8, 2))
  examples = [processor.prepare([image], "what is it?") for image in images]
  batcher = Batcher(2048, processor.blank, [ImageBucket(*examples[0].size)], buckets=(32,))
  bucket, generation = batcher.bucket(examples[0]), GenerationConfig(4, ignore_eos=True)

  def pack(own=(), *, batch_size):
    return batcher.pack(own, bucket=bucket, batch_size=batch_size)

  def answers(engine):
    count = engine.prefill_rows(pack(batch_size=1))
    groups = [range(first, min(first + count, 4)) for first in range(0, 4, count)]
    batches = [
      Batch(pack([examples[i] for i in own], batch_size=count), [Request(i, tag=i) for i in own]) for own in groups
    ]
    return {row.request.tag: row.tokens for turn in engine.answer(batches) for row in turn}

  expected = answers(model.engine(schedule, generation, BatchSizes(decode=2 * data, prefill=data)))
  ample = model.engine(schedule, generation, BatchSizes(num_rows=4))
  assert answers(ample) == expected and ample.capacity.chosen.decode == 4
  assert ample.programs.num_programs <= 3
  shapes = sharding.abstract_rows(
    (pack(batch_size=1), np.zeros(1, np.uint32)), sharding.mesh_of(model.model.params), data
  )
  one = ample.programs.prefill_memory(*shapes)
  monkeypatch.setattr(capacity, "free_memory", lambda mesh: one.temporaries + 2 * one.results)
  tight = model.engine(schedule, generation, BatchSizes(num_rows=400))
  assert answers(tight) == expected and tight.capacity.chosen.decode == data


def test_a_batch_with_more_rows_than_there_are_slots_gets_others(loaded, images, monkeypatch):
  """And the compiler, which takes tens of milliseconds to tell a program's memory, is asked once for each."""
  monkeypatch.setattr(capacity, "free_memory", lambda mesh: 1)
  compiled._programs.clear()
  asked, memory_of = [], Memory.of
  monkeypatch.setattr(Memory, "of", lambda program: asked.append(program) or memory_of(program))
  model = loaded("clip_mha")
  processor = model.prompts()
  examples = [processor.prepare([image], "what is it?") for image in images]
  batcher = Batcher(2048, processor.blank, [ImageBucket(*examples[0].size)], buckets=(32,))
  bucket = batcher.bucket(examples[0])
  engine = model.engine(model.schedule("none"), GenerationConfig(3, ignore_eos=True))
  groups = [[0], [1, 2], [3]]
  batches = [
    Batch(
      batcher.pack([examples[index] for index in own], bucket=bucket, batch_size=len(own)),
      [Request(index, tag=index) for index in own],
    )
    for own in groups
  ]
  found = {row.request.tag: row.tokens for turn in engine.answer([*batches, *batches[1:]]) for row in turn}
  assert len(asked) == len({id(program) for program in asked}) > 2
  alone = model.engine(model.schedule("none"), GenerationConfig(3, ignore_eos=True), BatchSizes(1, 1))
  for index, example in enumerate(examples):
    inputs = batcher.pack([example], bucket=bucket, batch_size=1)
    assert alone(inputs, [index]).tokens == [found[index]]


def test_free_memory_is_what_a_device_has_left(monkeypatch):
  stats = {"bytes_limit": 100 * capacity.MIB, "bytes_in_use": 40 * capacity.MIB}
  device = types.SimpleNamespace(process_index=0, memory_stats=lambda: stats)
  own = unittest.mock.Mock(spec=Mesh, devices=np.array([device, device]))
  assert capacity.free_memory(own) == int(60 * capacity.USABLE) * capacity.MIB
  monkeypatch.setattr(capacity.host_memory, "available", lambda: 80 * capacity.MIB)
  device.memory_stats = lambda: None  # CPU devices share the memory of the machine
  assert capacity.free_memory(own) == int(40 * capacity.USABLE) * capacity.MIB


def test_a_platform_that_does_not_say_what_programs_take():
  silent = Memory.of(types.SimpleNamespace(memory_analysis=lambda: None))
  assert capacity_of(1, BatchSizes(), room=1000).slots(4, 10, lambda count: dict.fromkeys(PROGRAMS, silent)) == 100


def test_no_more_rows_together_than_there_are():
  assert BatchSizes(10_000, 3, 4).at_most(4) == BatchSizes(4, 3, 4)
  assert BatchSizes(num_rows=9).at_most(4) == BatchSizes(num_rows=9)
