"""Planning for TPUs: the search for the most slots, what compilers say, and programs at true sizes by shapes alone."""

import concurrent.futures
import functools
import types
from concurrent.futures.process import BrokenProcessPool

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from checkpoints_convert.transforms import quantize
from experiments.shared import compiler_report, planned
from experiments.tpu_plan import plan
from himap_jax.engine import sharding


def largest(size, capacity, limit):
  """The answer of `plan.largest`, where a number of rows up to the capacity takes a size, and the rows it asked about.

  The limit may depend on what has been asked.
  """
  asked = []

  def measure(rows):
    asked.append(rows)
    return size(rows) if rows <= capacity else None

  return plan.largest(measure, lambda: limit(asked)), asked


@pytest.mark.parametrize("capacity", [0, 1, 2, 3, 17, 64, 250])
@pytest.mark.parametrize("bend", [0, 40])
@pytest.mark.parametrize("limit", [50, 1000, 10**6])
def test_the_largest_number_of_rows_that_fits(capacity, bend, limit):
  found, asked = largest(lambda rows: 100 + 10 * rows + bend * (rows > 5), capacity, lambda _: limit)
  assert found == capacity
  assert len(asked) == len(set(asked)) <= 24


def test_a_good_guess_takes_five_compilations():
  assert largest(affine, 123, lambda _: affine(123)) == (123, [1, 2, 16, 123, 124])


def affine(rows):
  return 1000 + 7 * rows


def test_the_limit_is_learned_where_something_does_not_fit():
  found, asked = largest(affine, 173, lambda asked: affine(173 if max(asked) > 173 else 140))
  assert found == 173
  assert asked[:5] == [1, 2, 16, 128, 140] and {173, 174} <= set(asked) and len(asked) <= 15


def test_few_rows_may_take_as_much_as_one():
  found, asked = largest(lambda rows: max(1000, 900 + 7 * rows), 123, lambda _: 900 + 7 * 123)
  assert found == 123
  assert max(asked) < 1000 and len(asked) < 10


def memory(arguments, temporaries=0, results=0):
  return {"arguments": arguments, "temporaries": temporaries, "results": results}


def test_what_is_in_memory_while_a_program_runs():
  """Weights of 100, ten slots of 5, a waiting batch of 8 and inputs of 3."""
  programs = {"prefill": memory(103, 40, 8), "enter": memory(58, 2), "decode": memory(150, 6)}
  assert plan.needed(programs) == {"weights": 100, "slots": 50, "prefill": 201, "enter": 160, "decode": 164}


@pytest.mark.parametrize("bound", plan.PROGRAMS)
def test_slots_are_those_that_all_programs_can(bound, monkeypatch):
  """Weights of 100, slots of 10 each, batches of 8; the limit is reached by another program each time."""
  asked = []

  def compiler(cell, name, slots):
    asked.append((name, slots))
    own = {
      "prefill": memory(100, 500 if bound == "prefill" else 0, 8),
      "enter": memory(8 + 10 * slots, 10 * slots if bound == "enter" else 0),
      "decode": memory(100 + 10 * slots, 30 * slots if bound == "decode" else 0),
    }
    found = {"collectives": name, "collectives of stages": "stages"}
    return {"seconds": 1.0, "memory": own[name], "limit": 1412, **found}

  monkeypatch.setattr(plan, "counted_flops", lambda cell: (102, 100))
  monkeypatch.setattr(planned, "mesh_of", lambda topology, tensor: types.SimpleNamespace(devices=np.empty((2, 4))))
  cell = plan.Cell("7b", "v5e:2x4", 4, "bfloat16", "none", 128, 32, 4)
  row = plan.make_row(cell, compiler, [])
  slots = {"prefill": (1412 - 608) // 10, "enter": (1412 - 108) // 20, "decode": (1412 - 108) // 40}[bound]
  assert (row["slots"], row["slots per device"], row["times none"]) == (2 * slots, slots / 4, 1)
  assert row["slots GiB"] == 10 * slots / 2**30 and row["weights GiB"] == 100 / 2**30
  assert row["prefill collectives of stages"] == "stages" and row["FLOPs, XLA's count ÷ ours"] == 1.02
  assert {rows for name, rows in asked if name == "prefill"} == {4}


def test_a_device_that_does_not_hold_a_batch_has_no_slots(monkeypatch):
  result = {"seconds": 1.0, "memory": None, "limit": 50, "collectives": "", "collectives of stages": ""}
  monkeypatch.setattr(plan, "counted_flops", lambda cell: (102, 100))
  monkeypatch.setattr(planned, "mesh_of", lambda topology, tensor: types.SimpleNamespace(devices=np.empty((1, 1))))
  row = plan.make_row(plan.Cell("7b", "v5e:1x1", 1, "bfloat16", "none", 128, 32, 4), lambda *_: result, [])
  assert row["slots"] == 0 and row["times none"] is None and row["decode arguments GiB"] is None


def test_memory_that_does_not_suffice():
  def lowered(message):
    def fail():
      raise jax.errors.JaxRuntimeError(message)

    return types.SimpleNamespace(compile=fail)

  message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 21.41G of 15.75G hbm. Exceeded by 5.66G."
  result = plan.compile_program(lowered(message))
  assert result["memory"] is None and result["limit"] == int(15.75 * 2**30)
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
  cell = plan.Cell("7b", "v5e:2x4", 8, "bfloat16", "himap", 128, 32, 4)
  compiled = {
    "prefill": {"memory": {"arguments": 1, "temporaries": 2, "results": 3}, "limit": None},
    "decode": {"memory": None, "limit": 99},
  }
  compiler = Compiler()
  monkeypatch.setattr(plan, "lower", lambda cell, rows: plan.programs.Lowered("prefill", "enter", "decode"))
  monkeypatch.setattr(plan, "compile_program", compiled.get)
  monkeypatch.setattr(plan, "compiler", functools.cache(lambda: compiler))
  for _ in range(2):
    assert {name: plan.compiled(tmp_path, cell, name, 4) for name in compiled} == compiled
  assert [rows for _, _, rows in compiler.calls] == [4, 4]
  compiler.crashes = 1
  for _ in range(2):
    result = plan.compiled(tmp_path, cell, "prefill", 8)
    assert result["memory"] is None and result[plan.CRASHED] and result["limit"] is None
  assert len(compiler.calls) == 3


def test_a_crash_is_not_the_end(monkeypatch):
  """Where the compiler crashes, the largest number of rows below is found, and the report says so."""

  def compiled(cell, name, rows):
    if rows > 20:
      return plan.NOTHING | {"seconds": 1.0, plan.CRASHED: True}
    return plan.NOTHING | {"seconds": 1.0, "memory": memory(100 + rows)}

  monkeypatch.setattr(plan, "counted_flops", lambda cell: (102, 100))
  monkeypatch.setattr(planned, "mesh_of", lambda topology, tensor: types.SimpleNamespace(devices=np.empty((1, 1))))
  row = plan.make_row(plan.Cell("7b", "v5e:1x1", 1, "bfloat16", "none", 128, 32, 4), compiled, [])
  assert 17 <= row["slots"] <= 20 and row[plan.CRASHED].startswith("enter, ")
  text = "\n".join(plan.report([row], "versions").summary)
  assert f"- 7b, v5e:1x1, none: {row[plan.CRASHED]}; the slots are those that it compiles." in text
  assert "crashed" not in "\n".join(plan.report([row | {plan.CRASHED: ""}], "versions").summary)


@pytest.mark.parametrize("method", ["none", "himap"])
def test_xla_counts_what_we_account_for(method):
  counted, accounted = plan.counted_flops(plan.Cell("demo", "v5e:2x4", 1, "bfloat16", method, 64, 8, 1))
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
