"""Times prefill, decode and whole examples against PyTorch, side by side in one run.

    python -m experiments.speed --flagfile=experiments/flags/speed_demo.flags

The sides run in separate processes on the same random weights and take turns. Repeating an interrupted command
continues with the scenarios not yet measured. Needs PyTorch: `pip install -e '.[test]'`.
"""

import pathlib

from absl import app, flags

from experiments.shared import machine, study
from experiments.shared.geometries import GEOMETRIES
from experiments.speed import measure, side, tables
from experiments.speed.side import Scenario
from himap_jax.errors import UserError
from himap_jax.pruning.methods import METHODS
from himap_jax.run import command

_GEOMETRY = flags.DEFINE_enum("geometry", "demo", list(GEOMETRIES), "Model sizes.")
_SCENARIOS = flags.DEFINE_list(
  "scenarios", ["60/1/1", "60/1/32"], "Scenarios: text tokens after the image / rows / tokens generated."
)
_SIDES = flags.DEFINE_list(
  "sides",
  ["none", "himap", "fastv", "none/int8", "transformers", "authors", "authors_cache"],
  "Our methods, with /int8 for int8 weights; in PyTorch, transformers and the HiMAP authors' algorithm without and "
  "with a cache.",
)
_TURNS = flags.DEFINE_integer("turns", 5, "Turns of each side.", lower_bound=1)
_AT_ONCE = flags.DEFINE_integer(
  "at_once", 1, "Sides that load and compile at a time; more need more memory and cores.", lower_bound=1
)
_WORKDIR = flags.DEFINE_string("workdir", "speed_work", "Directory of measurements, to resume from.")
_OUTPUT = flags.DEFINE_string("output", "speed_output", "Directory of the tables.")
_WEIGHTS_DIR = flags.DEFINE_string("weights_dir", "/dev/shm", "Directory of the random weights during the run.")


def run() -> int:
  sides = study.chosen(_SIDES, (*METHODS, *(f"{name}/int8" for name in METHODS), *side.PYTORCH))
  scenarios = [_scenario(text) for text in _SCENARIOS.value]
  measured = (pathlib.Path(side.__file__).with_name(name) for name in ("ours.py", "pytorch.py"))
  workdir = study.open_workdir(
    geometry=_GEOMETRY.value,
    sides=sides,
    turns=_TURNS.value,
    processor=machine.processor(),
    code=machine.checksum_of_library(measured),
    **machine.versions("jax", "torch", "transformers"),
  )
  how = {"turns": _TURNS.value, "at_once": _AT_ONCE.value, "weights_dir": pathlib.Path(_WEIGHTS_DIR.value)}
  results = measure.run(scenarios, sides, workdir=workdir, **how)
  count = f"{machine.processor()}, medians of {_TURNS.value} turns"
  print(study.write(tables.report(results, count), "speed"))
  return 0


def _scenario(text: str) -> Scenario:
  sizes = text.split("/")
  if len(sizes) != 3 or not all(size.isdecimal() and int(size) for size in sizes):
    raise UserError(f"--scenarios: {text!r} is not instruction tokens / rows / new tokens, such as 60/1/32")
  return Scenario(_GEOMETRY.value, *map(int, sizes))


if __name__ == "__main__":
  app.run(lambda argv: command.execute("speed", argv, run))
