"""Compiles prefill and decode for TPUs without having one, and finds the largest batch that fits.

    python -m experiments.tpu_plan --flagfile=experiments/flags/tpu_plan.flags

Needs libtpu, `pip install -e '.[tpu]'`, but neither a TPU nor weights. Repeating an interrupted command resumes it.

Compiling proves that a program lowers to the TPU's instructions and that its arguments and temporaries fit into a
device's memory, and shows its collectives. It says nothing about speed.
"""

import functools
import itertools

from absl import app, flags

from experiments.shared import machine, planned, study
from experiments.shared.geometries import GEOMETRIES
from experiments.tpu_plan import plan, tables
from himap_jax.pruning.methods import METHODS
from himap_jax.run import command

_MODELS = flags.DEFINE_list("models", ["7b", "13b"], f"Any of {', '.join(GEOMETRIES)}.")
_TOPOLOGIES = flags.DEFINE_list(
  "topologies", ["v5e:2x4"], "TPU slices, such as v5e:2x4, v5e:1x1, v6e:2x2, v4:2x2x1, v5p:2x2x1."
)
_TENSOR = flags.DEFINE_list("tensor", ["8"], "Devices that share the heads, as in --mesh of himap_jax.run.")
_WEIGHTS = flags.DEFINE_list("weights", ["bfloat16"], f"Any of {', '.join(plan.DTYPES)}.")
_METHODS = flags.DEFINE_list(
  "methods", ["none", "fastv", "himap"], "Methods with their default schedules; list none first."
)
_BUCKET = flags.DEFINE_integer("bucket", 128, "Padded text length.", lower_bound=1)
_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 32, "Tokens reserved for an answer.", lower_bound=1)
_WORKDIR = flags.DEFINE_string("workdir", "tpu_plan_work", "Directory of compilation results, to resume from.")
_OUTPUT = flags.DEFINE_string("output", "tpu_plan_output", "Directory of the tables.")


def run() -> int:
  models, weights = study.chosen(_MODELS, GEOMETRIES), study.chosen(_WEIGHTS, plan.DTYPES)
  methods, tensor = study.chosen(_METHODS, METHODS), command.numbers(_TENSOR, int)
  planned.without_devices()
  places = list(itertools.product(_TOPOLOGIES.value, tensor))
  for topology, size in places:
    planned.mesh_of(topology, size)
  versions = machine.versions("jax", "libtpu")
  compile_at = functools.partial(plan.compiled, study.open_workdir(**versions))
  cells = [
    plan.Cell(model, *place, dtype, method, _BUCKET.value, _NEW_TOKENS.value)
    for model, place, dtype, method in itertools.product(models, places, weights, methods)
  ]
  rows: list[tables.Row] = []
  text = ""
  for number, cell in enumerate(cells, start=1):
    print(f"[{number}/{len(cells)}] {cell.name}", flush=True)
    rows.append(tables.make_row(cell, compile_at, rows))
    text = study.write(tables.report(rows, ", ".join(map(" ".join, versions.items()))), "tpu_plan")
  print(text)
  return 0


if __name__ == "__main__":
  app.run(lambda argv: command.execute("tpu_plan", argv, run))
