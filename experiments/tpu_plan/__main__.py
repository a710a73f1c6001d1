"""Compiles the programs for TPUs without having one, and finds the most slots that fit.

    python -m experiments.tpu_plan --flagfile=experiments/flags/tpu_plan.flags

Needs libtpu, `pip install -e '.[tpu]'`, but neither a TPU nor weights. Repeating an interrupted command resumes it.

Compiling proves that a program lowers to the TPU's instructions and that its arguments and temporaries fit into a
device's memory, and shows its collectives. It says nothing about speed.
"""

import functools
import itertools
import pathlib
from typing import Any

from absl import flags

from experiments.shared import machine, planned, study
from experiments.shared.geometries import GEOMETRIES
from experiments.tpu_plan import plan
from himap_jax.pruning.methods import METHODS
from himap_jax.run import flag_values


def define_flags() -> None:
  flags.DEFINE_list("models", ["7b", "13b"], f"Any of {', '.join(GEOMETRIES)}.")
  flags.DEFINE_list("topologies", ["v5e:2x4"], "TPU slices, such as v5e:2x4, v5e:1x1, v6e:2x2, v4:2x2x1, v5p:2x2x1.")
  flags.DEFINE_list("tensor", ["8"], "Devices that share the heads, as in --mesh of himap_jax.run.")
  flags.DEFINE_list("weights", ["bfloat16"], f"Any of {', '.join(plan.DTYPES)}.")
  flags.DEFINE_list("methods", ["none", "fastv", "himap"], "Methods with their default schedules; list none first.")
  flags.DEFINE_integer("bucket", 128, "Padded text length.", lower_bound=1)
  flags.DEFINE_integer("max_new_tokens", 32, "The longest answer, in tokens.", lower_bound=1)


def run(values: Any) -> study.Report:
  models, weights = flag_values.chosen(values["models"], GEOMETRIES), flag_values.chosen(values["weights"], plan.DTYPES)
  methods, tensor = flag_values.chosen(values["methods"], METHODS), flag_values.numbers(values["tensor"], int)
  planned.without_devices()
  places = list(itertools.product(values.topologies, tensor))
  for place in places:
    planned.mesh_of(*place)
  versions = machine.versions("jax", "libtpu")
  code = machine.checksum_of_library(pathlib.Path(__file__).parent.glob("*.py"))
  compile_at = functools.partial(plan.compiled, study.open_workdir(**versions, code=code))
  cells = [
    plan.Cell(model, *place, dtype, method, values.bucket, values.max_new_tokens)
    for model, place, dtype, method in itertools.product(models, places, weights, methods)
  ]
  report = functools.partial(plan.report, versions=", ".join(map(" ".join, versions.items())))
  rows: list[plan.Row] = []
  for number, cell in enumerate(cells, start=1):
    print(f"[{number}/{len(cells)}] {cell.name}", flush=True)
    rows.append(plan.make_row(cell, compile_at, rows))
    study.write(report(rows), "tpu_plan")
  return report(rows)


if __name__ == "__main__":
  study.start("tpu_plan", define_flags, run, has_subject=False)
