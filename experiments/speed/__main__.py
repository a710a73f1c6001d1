"""Times prefill, decode and whole examples against PyTorch, side by side in one run.

    python -m experiments.speed --flagfile=experiments/flags/speed_demo.flags

The sides run in separate processes on the same random weights and take turns. Repeating an interrupted command
continues with the scenarios not yet measured. Needs PyTorch: `pip install -e '.[test]'`.
"""

import pathlib
from typing import Any

from absl import flags

from experiments.shared import machine, study
from experiments.shared.geometries import GEOMETRIES
from experiments.speed import measure, side, tables
from himap_jax.errors import UserError
from himap_jax.pruning.methods import METHODS
from himap_jax.run import flag_values

SIDES = (*METHODS, *(f"{name}/int8" for name in METHODS), *side.PYTORCH)


def define_flags() -> None:
  flags.DEFINE_enum("geometry", "demo", list(GEOMETRIES), "Model sizes.")
  flags.DEFINE_list(
    "scenarios", ["60/1/1", "60/1/32"], "Scenarios: text tokens after the image / rows / tokens generated."
  )
  flags.DEFINE_list(
    "sides",
    ["none", "himap", "fastv", "none/int8", "transformers", "authors", "authors_cache"],
    "Our methods, with /int8 for int8 weights; in PyTorch, transformers and the HiMAP authors' algorithm without and "
    "with a cache.",
  )
  flags.DEFINE_integer("turns", 5, "Repetitions per side, in turns.", lower_bound=1)
  flags.DEFINE_integer(
    "at_once", 1, "Sides that load and compile at a time; more need more memory and cores.", lower_bound=1
  )
  flags.DEFINE_string("weights_dir", "/dev/shm", "Directory of the random weights during the run.")


def run(values: Any) -> study.Report:
  measure.check_geometry(values.geometry)
  settings = {"geometry": values.geometry, "sides": flag_values.chosen(values["sides"], SIDES), "turns": values.turns}
  scenarios = [_scenario(values.geometry, text) for text in values.scenarios]
  workdir = study.open_workdir(**settings, **measure.provenance())
  how = {"turns": values.turns, "at_once": values.at_once, "weights_dir": pathlib.Path(values.weights_dir)}
  results = measure.run(scenarios, values.sides, workdir=workdir, **how)
  return tables.report(results, f"{machine.processor()}, medians of {values.turns} turns")


def _scenario(geometry: str, text: str) -> side.Scenario:
  sizes = text.split("/")
  if len(sizes) != 3 or not all(size.isdecimal() and int(size) for size in sizes):
    raise UserError(f"--scenarios: {text!r} is not instruction tokens / rows / new tokens, such as 60/1/32")
  return side.Scenario(geometry, *map(int, sizes))


if __name__ == "__main__":
  study.start("speed", define_flags, run, has_subject=False)
