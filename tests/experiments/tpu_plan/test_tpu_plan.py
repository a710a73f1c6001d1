"""Planning for TPUs: the most slots, what compilers say, and programs at true sizes by shapes alone."""

import concurrent.futures
import dataclasses
import functools
import types
from concurrent.futures.process import BrokenProcessPool

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from checkpoints_convert.int8 import quantize
from experiments.shared import compiler_report, planned
from experiments.tpu_plan import plan
from himap_jax.engine import sharding
from himap_jax.engine.capacity import PROGRAMS
from himap_jax.model.kernels import xla
from himap_jax.model.network import Model


def memory(arguments, temporaries=0, results=0):
  return {"arguments": arguments, "temporaries": temporaries, "results": results}


@pytest.fixture
def place(monkeypatch):
  """Returns `planned(num_shards, limit)`: a mesh of so many groups of four devices whose memory is `limit` bytes."""

  def make(num_shards, limit):
    mesh = Mesh(np.array([*jax.devices()] * num_shards)[: 4 * num_shards].reshape(num_shards, 4), ("data", "tensor"))
    network = types.SimpleNamespace(kernels=dataclasses.replace(xla.KERNELS, prefill_tokens=2820, most_slots=1000))
    weights = jax.ShapeDtypeStruct((100,), jnp.int8, sharding=sharding.replicated(mesh))
    inputs = types.SimpleNamespace(layout=types.SimpleNamespace(num_slots=704))
    monkeypatch.setattr(plan, "counted_flops", lambda cell: (102, 100))
    monkeypatch.setattr(plan, "HBM", {"v5e": limit / 2**30})
    monkeypatch.setattr(plan, "shapes", lambda cell, batch_size: (Model({"own": weights}, network), inputs, None))
    monkeypatch.setattr(planned, "mesh_of", lambda topology, tensor: mesh)

  return make


CELL = plan.Cell("7b", "v5e:2x4", 4, "bfloat16", "none", 128, 32)


@pytest.mark.parametrize("bound", PROGRAMS)
def test_slots_are_those_that_all_programs_can(bound, place):
  """Weights of 100, slots of 10 each, batches of 8; the limit is reached by another program each time."""
  asked = []

  def compiler(cell, name, sizes):
    asked.append((name, sizes))
    own = {
      "prefill": memory(100, 300 if bound == "prefill" else 0, 8),
      "enter": memory(8 + 10 * sizes.slots, 10 * sizes.slots if bound == "enter" else 0),
      "decode": memory(100 + 10 * sizes.slots, 30 * sizes.slots if bound == "decode" else 0),
    }
    found = {"collectives": name, "collectives of stages": "stages", "bytes per slot": 10}
    return {"seconds": 1.0, "memory": own[name], **found}

  place(2, 1412)
  row = plan.make_row(CELL, compiler, [])
  slots = {"prefill": (1412 - 416) // 10, "enter": (1412 - 108) // 20, "decode": (1412 - 108) // 40}[bound]
  assert (row["slots"], row["slots per device"], row["times none"]) == (2 * slots, slots / 4, 1)
  assert row["slots GiB"] == 10 * slots / 2**30 and row["weights GiB"] == 100 / 2**30
  assert row["prefill collectives of stages"] == "stages" and row["FLOPs, XLA's count ÷ ours"] == 1.02
  assert row["prefill rows"] == 8 and {sizes.prefill for _, sizes in asked} == {4}


def test_a_device_that_does_not_hold_a_batch_has_no_slots(place):
  place(1, 150)
  row = plan.make_row(CELL, lambda *_: plan.NOTHING | {"seconds": 1.0}, [])
  assert row["slots"] == 0 and row["times none"] is None and row["decode arguments GiB"] is None


def test_memory_that_does_not_suffice():
  def lowered(message):
    def fail():
      raise jax.errors.JaxRuntimeError(message)

    return types.SimpleNamespace(compile=fail)

  result = plan.compile_program(lowered("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm."))
  assert result["memory"] is None
  with pytest.raises(jax.errors.JaxRuntimeError):
    plan.compile_program(lowered("INTERNAL: something else"))


class Compiler:
  """Compiles in the process of the tests, and crashes as often as it is told to."""

  def __init__(self):
    self.crashes, self.calls = 0, []

  def submit(self, function, *arguments):
    future = concurrent.futures.Future()
    self.calls.append(arguments)
    if self.crashes:
      self.crashes -= 1
      future.set_exception(BrokenProcessPool())
    else:
      future.set_result(function(*arguments))
    return future


def test_a_cell_goes_through_its_file(tmp_path, monkeypatch):
  compiled = {"prefill": {"memory": memory(1, 2, 3)}, "decode": {"memory": None}}
  compiler = Compiler()
  monkeypatch.setattr(plan, "lower", lambda cell, sizes: (plan.programs.Lowered("prefill", "enter", "decode"), 7))
  monkeypatch.setattr(plan, "compile_program", compiled.get)
  monkeypatch.setattr(plan, "compiler", functools.cache(lambda: compiler))
  for slots in (5, 6, 5):
    for name, own in compiled.items():
      assert plan.compiled(tmp_path, CELL, name, plan.Sizes(4, slots)) == own | {"bytes per slot": 7}
  assert [sizes for _, _, sizes in compiler.calls] == [(4, 5), (4, 5), (4, 6)]  # a prefill has no slots
  compiler.crashes = 1
  for _ in range(2):
    result = plan.compiled(tmp_path, CELL, "prefill", plan.Sizes(8, 8))
    assert result["memory"] is None and result[plan.CRASHED]
  assert len(compiler.calls) == 4


def test_a_crash_is_not_the_end(place):
  """Where the compiler crashes, fewer slots are taken, and the report says so."""

  def compiled(cell, name, sizes):
    found = plan.NOTHING | {"seconds": 1.0, "bytes per slot": 50}
    if name != "prefill" and sizes.slots > 20:
      return found | {plan.CRASHED: True}
    return found | {"memory": memory(100 + sizes.slots)}

  place(1, 1412)
  row = plan.make_row(CELL, compiled, [])
  assert 17 <= row["slots"] <= 20 and row[plan.CRASHED].startswith("enter, ")
  text = "\n".join(plan.report([row], "versions").summary)
  assert f"- 7b, v5e:2x4, none: {row[plan.CRASHED]}; the slots are those that it compiles." in text
  assert "crashed" not in "\n".join(plan.report([row | {plan.CRASHED: ""}], "versions").summary)


@pytest.mark.parametrize("method", ["none", "himap"])
def test_xla_counts_what_we_account_for(method):
  counted, accounted = plan.counted_flops(plan.Cell("demo", "v5e:2x4", 1, "bfloat16", method, 64, 8))
  assert accounted == pytest.approx(counted, rel=0.02)


def test_int8_weights_lie_as_their_originals():
  mesh = sharding.make_mesh(2, 3)
  model, *_ = planned.shapes_on(mesh, "demo", batch_size=2, num_text_slots=64, int8_weights=True)
  layer = model.params["language_model"]["layers_0"]
  up, down = (layer["mlp"][name]["weight"] for name in ("up_proj", "down_proj"))
  assert (up.qvalue.dtype, up.qvalue.shape, up.scale.shape) == (jnp.int8, (1536, 576), (1536, 1))
  for array, spec in (
    (up.qvalue, ("tensor", None)),
    (up.scale, ("tensor", None)),
    (down.qvalue, (None, "tensor")),
    (down.scale, (None, None)),
  ):
    assert array.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(*spec)), 2)
  real = quantize(jnp.ones((1536, 576), jnp.bfloat16))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), real) == jax.tree.map(lambda x: (x.shape, x.dtype), up)


HLO = """
  %all-reduce.1 = f32[2,40,64]{2,1,0} all-reduce(%x), channel_id=1, metadata={op_name="jit(f)/layer_0/o_proj/dot"}
  %all-gather-start.1 = (bf16[2,8]{1,0}, bf16[4,8]{1,0}) all-gather-start(%y), metadata={op_name="jit(f)/prune_before_layer_2/score"}
  %all-gather-done.1 = bf16[4,8]{1,0} all-gather-done(%all-gather-start.1)
  %fusion.1 = (pred[], s32[3]{0}) all-reduce(%a, %b), to_apply=%and
  %add.1 = f32[2]{0} add(%all-reduce.1, %c)
"""


def test_collectives_of_a_program():
  found = compiler_report.collectives(types.SimpleNamespace(as_text=lambda: HLO))
  assert [(one.kind, one.num_bytes) for one in found] == [
    ("all-reduce", 2 * 40 * 64 * 4),
    ("all-gather", 4 * 8 * 2),
    ("all-reduce", 1 + 12),
  ]
  assert found[1].scope == "jit(f)/prune_before_layer_2/score"
  assert compiler_report.summarize(found) == "2 all-reduce 0.0 MiB, 1 all-gather 0.0 MiB"
  assert compiler_report.summarize([]) == "none"
