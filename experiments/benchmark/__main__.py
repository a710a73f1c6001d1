"""Times prefill, decode and whole examples against PyTorch, side by side in one run.

    python -m experiments.benchmark --flagfile=experiments/flags/benchmark_demo.flags

Every side runs in a process of its own on the same random weights, and they take turns. Stopped at any time, the same command
goes on with the scenarios that have not been measured. Needs PyTorch: `pip install -e '.[test]'`.
"""

import importlib.metadata
import pathlib
import sys

from absl import app, flags

from experiments import machine
from experiments.benchmark import side, study, tables
from experiments.benchmark.scenarios import Scenario
from experiments.benchmark.side import PYTORCH
from experiments.geometries import GEOMETRIES
from himap_jax import command, methods

_GEOMETRY = flags.DEFINE_enum("geometry", "demo", list(GEOMETRIES), "Whose sizes.")
_SCENARIOS = flags.DEFINE_list(
  "scenarios", ["60/1/1", "60/1/32"], "What to run: text tokens after the image / rows / tokens generated."
)
_SIDES = flags.DEFINE_list(
  "sides",
  ["none", "himap", "fastv", "none/int8", "transformers", "authors", "authors_cache"],
  "Our methods, with /int8 for weights of eight bits; transformers in PyTorch; the HiMAP authors' algorithm in PyTorch, without and with a cache.",
)
_TURNS = flags.DEFINE_integer("turns", 5, "How many turns each side takes.", lower_bound=1)
_AT_ONCE = flags.DEFINE_integer(
  "at_once", 1, "How many sides load and compile at a time; more need more memory and processors.", lower_bound=1
)
_WORKDIR = flags.DEFINE_string("workdir", "benchmark_work", "What was measured; a second start goes on from it.")
_OUTPUT = flags.DEFINE_string("output", "benchmark_output", "Directory of the tables.")
_WEIGHTS_DIR = flags.DEFINE_string("weights_dir", "/dev/shm", "Where the random weights lie while it runs.")


def main(argv: list[str]) -> None:
  command.execute("benchmark", argv, run)


def run() -> int:
  """Measures what is missing and writes the tables."""
  known = (*methods.METHODS, *(f"{name}/int8" for name in methods.METHODS), *PYTORCH)
  for name in _SIDES.value:
    if name not in known:
      raise ValueError(f"--sides: {name!r} is neither a method, METHOD/int8, nor one of {', '.join(PYTORCH)}")
  scenarios = [_scenario(text) for text in _SCENARIOS.value]
  workdir, output = (pathlib.Path(flag.value).absolute() for flag in (_WORKDIR, _OUTPUT))
  for directory in (workdir, output):
    directory.mkdir(parents=True, exist_ok=True)
  settings = {
    "geometry": _GEOMETRY.value,
    "sides": _SIDES.value,
    "turns": _TURNS.value,
    "processor": machine.processor(),
  }
  settings |= {name: importlib.metadata.version(name) for name in ("jax", "torch", "transformers")}
  measured = (pathlib.Path(side.__file__).with_name(name) for name in ("ours.py", "pytorch.py"))
  settings["code"] = machine.checksum_of_library(measured)
  command.hold_to_settings(workdir / "settings.json", settings, "use another --workdir")
  study.run(
    _GEOMETRY.value,
    scenarios,
    _SIDES.value,
    turns=_TURNS.value,
    at_once=_AT_ONCE.value,
    workdir=workdir,
    weights_dir=pathlib.Path(_WEIGHTS_DIR.value),
  )
  heading = f"`python -m experiments.benchmark {' '.join(sys.argv[1:])}` on {machine.processor()}, medians of {_TURNS.value} turns."
  tables.write(output, tables.read(workdir, scenarios), heading)
  print((output / "benchmark.md").read_text(encoding="utf-8"))
  return 0


def _scenario(text: str) -> Scenario:
  sizes = text.split("/")
  if len(sizes) != 3 or not all(size.isdecimal() and int(size) for size in sizes):
    raise ValueError(f"--scenarios: {text!r} is not instruction tokens / rows / new tokens, as 60/1/32")
  return Scenario(_GEOMETRY.value, *map(int, sizes))


if __name__ == "__main__":
  app.run(main)
