"""Compiles prefill and decode for TPUs without one, and finds the largest batch that fits.

    python -m experiments.tpu_plan --flagfile=experiments/flags/tpu_plan.flags

Needs libtpu, `pip install -e '.[tpu]'`, and no TPU and no weights. Stopped at any time, the same command goes on.

That a program compiles proves that it lowers to the TPU's instructions, that its arguments and temporaries fit into a device's
memory, and which collectives it runs. It says nothing about speed.
"""

import itertools
import pathlib
import sys
from importlib import metadata

from absl import app, flags

from experiments import planned
from experiments.geometries import GEOMETRIES
from experiments.tpu_plan import plan, tables
from himap_jax import command, methods

_MODELS = flags.DEFINE_list("models", ["7b", "13b"], f"Any of {', '.join(GEOMETRIES)}.")
_TOPOLOGIES = flags.DEFINE_list(
  "topologies", ["v5e:2x4"], "TPU slices, as v5e:2x4, v5e:1x1, v6e:2x2, v4:2x2x1, v5p:2x2x1."
)
_TENSOR = flags.DEFINE_list("tensor", ["8"], "Devices that share the heads, as in --mesh of himap_jax.run.")
_WEIGHTS = flags.DEFINE_list("weights", ["bfloat16"], f"Any of {', '.join(plan.DTYPES)}.")
_METHODS = flags.DEFINE_list("methods", ["none", "fastv", "himap"], "With their default schedules; none comes first.")
_BUCKET = flags.DEFINE_integer("bucket", 128, "Padded text length.", lower_bound=1)
_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 32, "Room for an answer.", lower_bound=1)
_WORKDIR = flags.DEFINE_string("workdir", "tpu_plan_work", "What was compiled; a second start goes on from it.")
_OUTPUT = flags.DEFINE_string("output", "tpu_plan_output", "Directory of the tables.")


def main(argv: list[str]) -> None:
  command.execute("tpu_plan", argv, run)


def run() -> int:
  """Compiles what is missing and writes the tables, which grow cell by cell."""
  for flag, known in ((_MODELS, GEOMETRIES), (_WEIGHTS, plan.DTYPES), (_METHODS, methods.METHODS)):
    for name in flag.value:
      if name not in known:
        raise ValueError(f"--{flag.name}: unknown {name!r}; known: {', '.join(known)}")
  planned.without_devices()
  tensor = command.numbers(_TENSOR, int)
  workdir, output = pathlib.Path(_WORKDIR.value), pathlib.Path(_OUTPUT.value)
  for directory in (workdir, output):
    directory.mkdir(parents=True, exist_ok=True)
  settings = {name: metadata.version(name) for name in ("jax", "libtpu")}
  command.hold_to_settings(workdir / "settings.json", settings, "use another --workdir")
  places = list(itertools.product(_TOPOLOGIES.value, tensor))
  for topology, size in places:
    planned.mesh_of(topology, size)
  cells = [
    plan.Cell(model, topology, size, weights, method, _BUCKET.value, _NEW_TOKENS.value)
    for model, (topology, size), weights, method in itertools.product(
      _MODELS.value, places, _WEIGHTS.value, _METHODS.value
    )
  ]
  compiler = plan.Compiler(workdir)
  rows: list[tables.Row] = []
  heading = f"`python -m experiments.tpu_plan {' '.join(sys.argv[1:])}`, " + ", ".join(
    f"{name} {version}" for name, version in settings.items()
  )
  for number, cell in enumerate(cells, start=1):
    print(f"[{number}/{len(cells)}] {cell.name}", flush=True)
    rows.append(tables.make_row(cell, compiler, rows))
    tables.write(output, rows, f"{heading}.")
  print((output / "tpu_plan.md").read_text(encoding="utf-8"))
  return 0


if __name__ == "__main__":
  app.run(main)
