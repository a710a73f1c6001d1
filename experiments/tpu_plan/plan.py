"""Compiles the real programs for an absent TPU, and tables the most slots that fit into its memory."""

import dataclasses
import functools
import multiprocessing
import pathlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.shared import compiler_report, geometries, kept, planned, tabular
from experiments.shared.study import Report
from himap_jax.engine import programs, sharding
from himap_jax.engine.accounting import model_sizes
from himap_jax.engine.capacity import PROGRAMS, BatchSizes, Capacity, Memory, needed, refused_by_compiler
from himap_jax.engine.decoding import DecodeConfig
from himap_jax.engine.prefill import prefill
from himap_jax.errors import UserError
from himap_jax.inputs import Inputs
from himap_jax.model.network import Model, Network, abstract_params
from himap_jax.pruning import cost

# GiB of a device that are available to programs.
HBM = {"v4": 31.25, "v5e": 15.75, "v5p": 95.0, "v6e": 31.25}
DTYPES = ("bfloat16", "int8")
GIB = 1 << 30

NOTHING = {"memory": None, "collectives": "", "collectives of stages": "", "bytes per slot": None}
CRASHED = "compiler crashed"  # a field of what is compiled, and of a row

Row = dict[str, Any]
PARTS = ("arguments", "temporaries", "results")  # of `Memory`
PLACE = ("model", "topology", "mesh", "weights")
SHOWN = (*PLACE, "method", "prefill rows", "slots", "slots per device", "times none", "device GiB")
SHOWN += (*(f"{name} GiB" for name in ("weights", "slots")), *(f"prefill {part} GiB" for part in PARTS))
SHOWN += ("decode temporaries GiB", *(f"{name} compile s" for name in ("prefill", "decode")), "prefill collectives")
SHOWN += ("prefill collectives of stages", "decode collectives", "FLOPs, XLA's count ÷ ours")


@dataclasses.dataclass(frozen=True)
class Cell:
  """A planned configuration."""

  model: str  # a key of `geometries.GEOMETRIES`
  topology: str  # a slice such as `v5e:2x4`
  tensor: int  # devices that share the heads; other devices hold different rows
  weights: str  # one of `DTYPES`; activations and caches are in bfloat16
  method: str  # with its default schedule
  num_text_slots: int  # the bucket
  num_new_tokens: int  # the longest answer

  @property
  def name(self) -> str:
    return "-".join(str(value).replace(":", "_") for value in dataclasses.astuple(self))


class Sizes(NamedTuple):
  """Rows of a prefill and slots, of the devices that share the heads."""

  prefill: int
  slots: int


def shapes(cell: Cell, batch_size: int) -> tuple[Model, Inputs, jax.ShapeDtypeStruct]:
  """The model, a batch and its seeds; `batch_size` is over all devices."""
  mesh, is_int8 = planned.mesh_of(cell.topology, cell.tensor), cell.weights == "int8"
  text = {"num_text_slots": cell.num_text_slots, "int8_weights": is_int8}
  return planned.shapes_on(mesh, cell.model, batch_size=batch_size, **text)


def lower(cell: Cell, sizes: Sizes) -> tuple[programs.Lowered, int]:
  """The lowered programs of `himap_jax.run`, and the bytes that a slot takes on a device, at least."""
  data = sharding.num_shards(planned.mesh_of(cell.topology, cell.tensor))
  model, inputs, seeds = shapes(cell, sizes.prefill * data)
  schedule = geometries.schedule_of(geometries.model_of(cell.model), cell.method)
  own = programs.Programs(model, schedule, DecodeConfig(cell.num_new_tokens))
  lowered = own.lower(inputs, seeds, programs.method_parameters(schedule), num_slots=sizes.slots * data)
  return lowered, sharding.device_bytes(own.slots(lowered.prefill.out_info, data))


def compile_program(lowered: Any) -> dict[str, Any]:
  """Compiles a lowered program; raises `jax.errors.JaxRuntimeError` for reasons other than memory.

  Returns:
    `seconds` of compilation; `memory`, its `capacity.Memory` on a device, or None where the compiler refuses it; and
    descriptions of all its collectives and of those in pruning stages.
  """
  start, compiled = time.perf_counter(), None
  with refused_by_compiler():
    compiled = lowered.compile()
  seconds = time.perf_counter() - start
  if compiled is None:
    return NOTHING | {"seconds": seconds}
  found = compiler_report.collectives(compiled)
  return {
    "seconds": seconds,
    "memory": dataclasses.asdict(Memory.of(compiled)),
    "collectives": compiler_report.summarize(found),
    "collectives of stages": compiler_report.summarize(one for one in found if "/prune_before_layer_" in one.scope),
  }


def compile_cell(cell: Cell, name: str, sizes: Sizes) -> dict[str, Any]:
  """`compile_program` of one of a cell's programs, with `bytes per slot` on a device, at least."""
  lowered, bytes_per_slot = lower(cell, sizes)
  return compile_program(getattr(lowered, name)) | {"bytes per slot": bytes_per_slot}


@functools.cache
def compiler() -> ProcessPoolExecutor:
  """A process that compiles, since the TPU's compiler crashes at some sizes and takes its process along."""
  return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), planned.without_devices)


def compiled(workdir: pathlib.Path, cell: Cell, name: str, sizes: Sizes) -> dict[str, Any]:
  """`compile_cell` in the process of `compiler`, cached in a directory; memory is None with `CRASHED` after a crash."""

  def make() -> dict[str, Any]:
    start = time.perf_counter()
    try:
      return compiler().submit(compile_cell, cell, name, sizes).result()
    except BrokenProcessPool:
      compiler.cache_clear()
      seconds = time.perf_counter() - start
      return NOTHING | {CRASHED: True, "seconds": seconds}

  numbers = "-".join(map(str, sizes[:1] if name == "prefill" else sizes))
  return kept.json_of(workdir / f"{cell.name}-{name}-{numbers}.json", make)


def counted_flops(cell: Cell) -> tuple[int, int]:
  """Multiplications of one row's prefill up to its first token: XLA's count of the unrolled program, and ours."""
  config = geometries.model_of(cell.model)
  schedule, shape = geometries.schedule_of(config, cell.method), geometries.image_shape(config)
  size = geometries.image_size(config)
  batch = {"batch_size": 1, "num_text_slots": cell.num_text_slots, "image_shape": shape, "size": size}
  inputs, _ = programs.abstract_inputs(config, sharding.make_mesh(), **batch)
  # Kernels that XLA counts: those of TPU and CPU skip masked blocks, and Pallas is not counted.
  model = Model(abstract_params(config, jnp.bfloat16), Network(config, jnp.bfloat16))
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
  program = jax.jit(lambda model, *arguments: prefill(model.bind(), *arguments[:2], schedule, arguments[2]))
  counted = program.lower(model, inputs, keys, programs.method_parameters(schedule)).cost_analysis()["flops"] / 2
  counts = size.num_tokens, cell.num_text_slots
  costs = cost.costs(model_sizes(config, shape), schedule, *counts, num_pictures=size.num_tiles)
  return int(counted), costs.prefill


def make_row(cell: Cell, compile_at: Callable[[Cell, str, Sizes], dict[str, Any]], before: Sequence[Row]) -> Row:
  """Plans a cell as the engine would; `compile_at` is `compiled` in some directory, and earlier rows hold no pruning."""
  crashes: list[str] = []

  def memory(name: str, sizes: Sizes) -> Memory | None:
    print(f"  {name}, {sizes.prefill if name == 'prefill' else sizes.slots} rows", end="", flush=True)
    result = compile_at(cell, name, sizes)
    if result.get(CRASHED):
      crashes.append(f"{name}, {sizes.slots} slots")
    found = result["memory"]
    print(": refused" if found is None else f": {Memory(**found).total / GIB:.2f} GiB", flush=True)
    return None if found is None else Memory(**found)

  mesh = planned.mesh_of(cell.topology, cell.tensor)
  data, tensor = mesh.devices.shape
  model, inputs, _ = shapes(cell, 1)
  limit, weights = int(HBM[cell.topology.partition(":")[0]] * GIB), sharding.device_bytes(model.params)
  capacity = Capacity(model, BatchSizes(), room=limit - weights)
  try:
    num_prefilled = capacity.prefill_rows(
      inputs.layout.num_slots, lambda count: memory("prefill", Sizes(count // data, count // data))
    )
  except UserError:  # a device does not hold one prompt
    num_prefilled = data
  prefill = compile_at(cell, "prefill", Sizes(num_prefilled // data, num_prefilled // data))

  def all_memory(count: int) -> dict[str, Memory] | None:
    found = {"prefill": Memory(**prefill["memory"])}
    for name in PROGRAMS[1:]:
      own = memory(name, Sizes(num_prefilled // data, count // data))
      if own is None:
        return None
      found[name] = own
    return found

  num_slots, found = 0, None
  if prefill["memory"] is not None:
    num_slots = capacity.slots(num_prefilled, prefill["bytes per slot"], all_memory)
    found = all_memory(num_slots)
  taken = needed(found, weights) if found else {}
  if not found or max(taken[name] for name in PROGRAMS) > limit - weights:
    num_slots, found, taken = 0, {}, {}
  counted, accounted = counted_flops(cell)
  row: Row = {
    "model": cell.model,
    "topology": cell.topology,
    "mesh": f"data:{data},tensor:{tensor}",
    "weights": cell.weights,
    "method": cell.method,
    "text slots": cell.num_text_slots,
    "new tokens": cell.num_new_tokens,
    "prefill rows": num_prefilled,
    "slots": num_slots,
    "slots per device": num_slots / mesh.size,
    "times none": None,
    "device GiB": limit / GIB,
  }
  plain = next((r for r in before if all(r[k] == row[k] for k in PLACE) and r["method"] == "none"), row)
  if plain["slots"]:
    row["times none"] = row["slots"] / plain["slots"]
  row |= {"weights GiB": weights / GIB, "slots GiB": taken["slots"] / GIB if taken else None}
  for name in PROGRAMS:
    sizes = Sizes(num_prefilled // data, num_slots // data)
    program = compile_at(cell, name, sizes) if found else NOTHING | {"seconds": None}
    row[f"{name} compile s"] = program["seconds"]
    row[f"{name} GiB in all"] = (taken[name] + weights) / GIB if taken else None
    row |= {f"{name} {part} GiB": getattr(found[name], part) / GIB if found else None for part in PARTS}
    row |= {f"{name} {field}": program[field] for field in ("collectives", "collectives of stages")}
  row["FLOPs, XLA's count ÷ ours"] = counted / accounted
  row[CRASHED] = "; ".join(crashes)
  return row


def report(rows: Sequence[Row], versions: str) -> Report:
  table = tabular.markdown(SHOWN, ([_text(row[name]) for name in SHOWN] for row in rows))
  crashes = [
    f"- {row['model']}, {row['topology']}, {row['method']}: {row[CRASHED]}; the slots are those that it compiles."
    for row in rows
    if row[CRASHED]
  ]
  notes = ["", "Where the compiler crashed, more slots may fit:", "", *crashes] if crashes else []
  return Report(versions, [*table, *notes], {"tpu_plan": rows})


def _text(value: Any) -> str:
  if value is None:
    return "–"
  return f"{value:.3g}" if isinstance(value, float) else str(value)
