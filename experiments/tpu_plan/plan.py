"""Compiles the real programs for an absent TPU, and tables the most slots that fit into its memory."""

import dataclasses
import functools
import math
import multiprocessing
import pathlib
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import jax
import jax.numpy as jnp

from experiments.shared import compiler_report, geometries, kept, planned, tabular
from experiments.shared.study import Report
from himap_jax.engine import programs, sharding
from himap_jax.engine.accounting import model_sizes
from himap_jax.engine.decoding import DecodeConfig
from himap_jax.engine.prefill import prefill
from himap_jax.model.network import Model, Network, abstract_params
from himap_jax.pruning import cost

FARTHEST, FEW = 8, 16  # the next guess is at most FARTHEST times what fits, while FEW rows or fewer fit
# GiB available to programs, until the compiler reports the limit.
HBM = {"v4": 31.25, "v5e": 15.75, "v5p": 95.0, "v6e": 31.25}
DTYPES = ("bfloat16", "int8")
PROGRAMS = programs.Lowered._fields
_USED = re.compile(r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
GIB = 1 << 30

NOTHING = {"memory": None, "limit": None, "collectives": "", "collectives of stages": ""}
CRASHED = "compiler crashed"  # a field of what is compiled, and of a row

Row = dict[str, Any]
PARTS = ("arguments", "temporaries", "results")  # of `compiler_report.Memory`
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
  num_prefill_rows: int  # prefilled together by the devices that share the heads

  @property
  def name(self) -> str:
    return "-".join(str(value).replace(":", "_") for value in dataclasses.astuple(self))


def lower(cell: Cell, slots: int) -> programs.Lowered:
  """Lowers the programs of `himap_jax.run`, for `slots` slots on every group of devices that share the heads."""
  mesh = planned.mesh_of(cell.topology, cell.tensor)
  model, inputs, seeds = planned.shapes_on(
    mesh,
    cell.model,
    batch_size=cell.num_prefill_rows * mesh.shape["data"],
    num_text_slots=cell.num_text_slots,
    int8_weights=cell.weights == "int8",
  )
  schedule = geometries.schedule_of(geometries.model_of(cell.model), cell.method)
  own = programs.Programs(model, schedule, DecodeConfig(cell.num_new_tokens))
  return own.lower(inputs, seeds, programs.method_parameters(schedule), num_slots=slots * mesh.shape["data"])


def compile_program(lowered: Any) -> dict[str, Any]:
  """Compiles a lowered program; raises `jax.errors.JaxRuntimeError` for reasons other than memory.

  Returns:
    `seconds` of compilation; `memory`, its `compiler_report.Memory` on a device, or None where it does not fit, with
    `limit`, the bytes available on a device if the compiler reports them; and descriptions of all its collectives and
    of those in pruning stages.
  """
  result: dict[str, Any] = dict(NOTHING)
  start = time.perf_counter()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    if used := _USED.search(str(error)):
      result["limit"] = int(float(used[3]) * _UNITS[used[4]])
    return result | {"seconds": time.perf_counter() - start}
  seconds = time.perf_counter() - start
  found = compiler_report.collectives(compiled)
  return result | {
    "seconds": seconds,
    "memory": dataclasses.asdict(compiler_report.memory(compiled)),
    "collectives": compiler_report.summarize(found),
    "collectives of stages": compiler_report.summarize(one for one in found if "/prune_before_layer_" in one.scope),
  }


def compile_cell(cell: Cell, name: str, slots: int) -> dict[str, Any]:
  """`compile_program` of one of a cell's programs."""
  return compile_program(getattr(lower(cell, slots), name))


@functools.cache
def compiler() -> ProcessPoolExecutor:
  """A process that compiles, since the TPU's compiler crashes at some sizes and takes its process along."""
  return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), planned.without_devices)


def compiled(workdir: pathlib.Path, cell: Cell, name: str, slots: int) -> dict[str, Any]:
  """`compile_cell` in the process of `compiler`, cached in a directory; memory is None with `CRASHED` after a crash."""

  def make() -> dict[str, Any]:
    start = time.perf_counter()
    try:
      return compiler().submit(compile_cell, cell, name, slots).result()
    except BrokenProcessPool:
      compiler.cache_clear()
      seconds = time.perf_counter() - start
      return NOTHING | {CRASHED: True, "seconds": seconds}

  return kept.json_of(workdir / f"{cell.name}-{name}-{slots}.json", make)


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


class CompilerCrash(Exception):
  """The compiler ended its process, so that nothing is known about a number of rows."""


def largest(measure: Callable[[int], int | None], limit: Callable[[], int]) -> int:
  """The largest number of slots that fits, 0 if one does not; memory is nearly affine in it.

  `measure` maps a number to bytes, or None where it does not fit; `limit` is a device's bytes, as far as known. After a
  `CompilerCrash` of `measure` the result is at most an eighth below the least number that crashes.
  """
  sizes: dict[int, int] = {}
  has_crashed = False
  below, above, rows, step = 0, math.inf, 1, 1
  while above - below > (max(1, above // 8) if has_crashed else 1):
    try:
      size = measure(rows)
    except CompilerCrash:
      size, has_crashed = None, True
    if size is None:
      above = rows
    else:
      below, sizes[rows] = rows, size
    if has_crashed:
      rows = (below + int(above)) // 2
      continue
    guess = _affine(sizes, limit()) if len(sizes) > 1 else 2 * below
    if below < guess < above:
      rows = min(guess, (FARTHEST if below <= FEW else 2) * below)  # a few rows more may take no more memory at all
    else:  # the answer is near the guess
      rows = below + step if guess <= below else int(above) - step
      step *= 4
      if not below < rows < above:
        rows = (below + int(above)) // 2
  return below


def _affine(sizes: dict[int, int], limit: int) -> int:
  """The rows at which the line through the last two sizes reaches the limit."""
  (a, size_a), (b, size_b) = sorted(sizes.items())[-2:]
  return b + (limit - size_b) * (b - a) // max(1, size_b - size_a)


def needed(programs: dict[str, dict[str, int]]) -> dict[str, int]:
  """Bytes of a device that are taken while each program runs, by program, and those of `weights` and `slots`.

  `programs` are their `compiler_report.Memory`. Beside a prefill there are all slots, and beside the others a batch that
  waits to enter; results of `enter` and `decode` take the place of their arguments.
  """
  prefill, enter, decode = (programs[name] for name in PROGRAMS)
  slots = enter["arguments"] - prefill["results"]
  weights = decode["arguments"] - slots
  return {
    "prefill": sum(prefill.values()) + slots,
    "enter": sum(enter.values()) + weights,
    "decode": sum(decode.values()) + prefill["results"],
    "weights": weights,
    "slots": slots,
  }


def make_row(cell: Cell, compile_at: Callable[[Cell, str, int], dict[str, Any]], before: Sequence[Row]) -> Row:
  """Plans a cell; `compile_at` is `compiled` in some directory, and earlier rows hold that of no pruning."""
  limits: list[int] = []
  crashes: list[str] = []

  def compile_all(slots: int) -> dict[str, dict[str, Any]]:
    """The programs, up to one that does not fit."""
    found = {}
    for name in PROGRAMS:
      found[name] = compile_at(cell, name, cell.num_prefill_rows if name == "prefill" else slots)
      if found[name]["limit"]:
        limits.append(found[name]["limit"])
      if found[name].get(CRASHED):
        crashes.append(f"{name}, {slots} slots")
        print(": the compiler crashed", flush=True)
        raise CompilerCrash
      if found[name]["memory"] is None:
        break
    return found

  def measure(slots: int) -> int | None:
    slots = max(slots, cell.num_prefill_rows)
    print(f"  {slots} slots", end="", flush=True)
    memory = {name: result["memory"] for name, result in compile_all(slots).items()}
    taken = needed(memory) if all(memory.get(name) for name in PROGRAMS) else None
    size = None if taken is None else max(taken[name] for name in PROGRAMS)
    fits = size is not None and size <= limit()
    print(f": {'fits' if fits else 'does not fit'}", flush=True)
    return size if fits else None

  def limit() -> int:
    return min(limits, default=int(HBM.get(cell.topology.partition(":")[0], 14) * GIB))

  devices = planned.mesh_of(cell.topology, cell.tensor).devices
  slots = largest(measure, limit)
  slots = slots if slots >= cell.num_prefill_rows else 0
  counted, accounted = counted_flops(cell)
  data, tensor = devices.shape
  row: Row = {
    "model": cell.model,
    "topology": cell.topology,
    "mesh": f"data:{data},tensor:{tensor}",
    "weights": cell.weights,
    "method": cell.method,
    "text slots": cell.num_text_slots,
    "new tokens": cell.num_new_tokens,
    "prefill rows": cell.num_prefill_rows * data,
    "slots": slots * data,
    "slots per device": slots * data / devices.size,
    "times none": None,
    "device GiB": limit() / GIB,
  }
  plain = next((r for r in before if all(r[k] == row[k] for k in PLACE) and r["method"] == "none"), row)
  if plain["slots"]:
    row["times none"] = row["slots"] / plain["slots"]
  found = compile_all(slots) if slots else {}
  memory = {name: result["memory"] for name, result in found.items()}
  taken = needed(memory) if slots else {}
  row |= {f"{name} GiB": taken[name] / GIB if taken else None for name in ("weights", "slots")}
  for name in PROGRAMS:
    program = found.get(name, NOTHING | {"seconds": None})
    sizes = program["memory"] or dict.fromkeys(PARTS)
    row[f"{name} compile s"] = program["seconds"]
    row[f"{name} GiB in all"] = taken[name] / GIB if taken else None
    row |= {f"{name} {part} GiB": None if size is None else size / GIB for part, size in sizes.items()}
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
