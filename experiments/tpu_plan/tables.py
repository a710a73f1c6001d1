"""A row for every cell: the largest batch and its costs."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from experiments.shared import planned, tabular
from experiments.shared.study import Report
from experiments.tpu_plan import plan
from experiments.tpu_plan.plan import Cell
from himap_jax.engine.programs import Programs

Row = dict[str, Any]
GIB = 1 << 30
PARTS = ("arguments", "temporaries", "results")  # of `compiler_report.Memory`


def make_row(cell: Cell, compile_at: Callable[[Cell, str, int], dict[str, Any]], before: Sequence[Row]) -> Row:
  """Plans a cell; `compile_at` is `plan.compiled` in some directory, and earlier rows hold that of no pruning."""
  limits = []

  def measure(name: str, rows: int) -> int | None:
    print(f"  {name}, {rows} rows", end="", flush=True)
    result = compile_at(cell, name, rows)
    print(f": {'fits' if result['memory'] else 'does not fit'}", flush=True)
    if result["limit"]:
      limits.append(result["limit"])
    return sum(result["memory"].values()) if result["memory"] else None

  def limit() -> int:
    return min(limits, default=int(plan.HBM.get(cell.topology.partition(":")[0], 14) * GIB))

  devices = planned.mesh_of(cell.topology, cell.tensor).devices
  rows = None
  for name in Programs._fields:
    rows = plan.largest(functools.partial(measure, name), limit, highest=rows)
  counted, accounted = plan.counted_flops(cell)
  data, tensor = devices.shape
  batch = rows * data
  row: Row = {
    "model": cell.model,
    "topology": cell.topology,
    "mesh": f"data:{data},tensor:{tensor}",
    "weights": cell.weights,
    "method": cell.method,
    "text slots": cell.num_text_slots,
    "new tokens": cell.num_new_tokens,
    "largest batch": batch,
    "rows per device": batch / devices.size,
    "times none": None,
    "device GiB": limit() / GIB,
  }
  plain = next((r for r in before if all(r[k] == row[k] for k in PLACE) and r["method"] == "none"), row)
  if plain["largest batch"]:
    row["times none"] = batch / plain["largest batch"]
  for name in Programs._fields:
    program = compile_at(cell, name, max(rows, 1))
    memory = program["memory"] or dict.fromkeys(PARTS)
    row[f"{name} compile s"] = program["seconds"]
    row |= {f"{name} {part} GiB": None if size is None else size / GIB for part, size in memory.items()}
    row |= {f"{name} {field}": program[field] for field in ("collectives", "collectives of stages")}
  row["FLOPs, XLA's count ÷ ours"] = counted / accounted
  return row


PLACE = ("model", "topology", "mesh", "weights")
SHOWN = (*PLACE, "method", "largest batch", "rows per device", "times none", "device GiB")
SHOWN += (*(f"prefill {part} GiB" for part in PARTS), "prefill compile s", "decode compile s", "prefill collectives")
SHOWN += ("prefill collectives of stages", "decode collectives", "FLOPs, XLA's count ÷ ours")


def report(rows: Sequence[Row], versions: str) -> Report:
  table = tabular.markdown(SHOWN, ([_text(row[name]) for name in SHOWN] for row in rows))
  return Report(versions, table, {"tpu_plan": rows})


def _text(value: Any) -> str:
  if value is None:
    return "–"
  return f"{value:.3g}" if isinstance(value, float) else str(value)
