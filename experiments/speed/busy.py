"""Measures from a trace how much of the time the devices are busy while `himap_jax.run` answers.

    python -m experiments.speed.busy --num_rows=48

The first run fills the compilation cache, the second is traced. The time counted runs from the results of the first
turn, when everything is compiled, to the end of the last program.
"""

import itertools
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from absl import flags
from jax.profiler import ProfileData

from experiments.shared import machine
from himap_jax.engine.engine import TURN
from himap_jax.run import command

CPU_THREADS, CPU_PROGRAM = "tf_XLAPjRtCpuClient", "ThunkExecutor::Execute"  # and the same "(wait for completion)"
DEVICE, DEVICE_PROGRAMS = "/device:", "XLA Modules"


def define_flags() -> None:
  flags.DEFINE_string("checkpoint", "demo", "As in himap_jax.run.")
  flags.DEFINE_string("prompts", "experiments/demo/prompts.jsonl", "File whose prompts are asked in turn.")
  flags.DEFINE_string("image_dir", "experiments/demo", "As in himap_jax.run.")
  flags.DEFINE_integer("num_rows", 48, "Rows of the run.", lower_bound=2)
  flags.DEFINE_integer("max_new_tokens", 16, "Tokens of every answer.", lower_bound=1)


class Span(NamedTuple):
  """From and to, in nanoseconds."""

  start: float
  end: float


def spans(profile: ProfileData) -> tuple[dict[str, list[Span]], float]:
  """When programs ran, by device, and when the host had the results of the first turn."""
  programs: dict[str, list[Span]] = {}
  turns: list[float] = []
  for plane in profile.planes:
    for line in plane.lines:
      for event in line.events:
        span = Span(event.start_ns, event.start_ns + event.duration_ns)
        if plane.name.startswith(DEVICE) and line.name == DEVICE_PROGRAMS:
          programs.setdefault(plane.name, []).append(span)
        elif line.name.startswith(CPU_THREADS) and event.name.startswith(CPU_PROGRAM):
          programs.setdefault("cpu", []).append(span)
        elif event.name == TURN:
          turns.append(span.end)
  return programs, min(turns)


def busy_seconds(programs: Iterable[Span], start: float) -> tuple[float, float]:
  """Seconds in which a device ran at least one program, and seconds in all, from `start` to its last program's end."""
  busy, reached = 0.0, start
  for span in sorted(programs):
    busy += max(0.0, span.end - max(span.start, reached))
    reached = max(reached, span.end)
  return busy / 1e9, (reached - start) / 1e9


def prompts() -> Iterator[str]:
  """The lines of the run's prompts, with ids of their own."""
  rows = pathlib.Path(flags.FLAGS.prompts).read_text(encoding="utf-8").splitlines()
  for number, row in enumerate(itertools.islice(itertools.cycle(rows), flags.FLAGS.num_rows)):
    yield json.dumps(json.loads(row) | {"id": str(number)})


def run() -> int:
  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(scratch)
    (folder / "prompts.jsonl").write_text("\n".join(prompts()), encoding="utf-8")
    arguments = [f"--{name}={flags.FLAGS[name].value}" for name in ("checkpoint", "image_dir", "max_new_tokens")]
    arguments += [f"--prompts={folder}/prompts.jsonl", f"--output={folder}/answers.jsonl", "--noresume", "--ignore_eos"]
    for profile in ([], [f"--profile_dir={folder}"]):
      subprocess.run([sys.executable, "-m", "himap_jax.run", *arguments, *profile], check=True)

    (trace,) = folder.rglob("*.xplane.pb")
    programs, start = spans(ProfileData.from_file(str(trace)))
  for device, own in programs.items():
    busy, seconds = busy_seconds(own, start)
    print(f"{device} ({machine.processor()}): busy {busy:.1f} of {seconds:.1f} s, {busy / seconds:.1%}")
  return 0


if __name__ == "__main__":
  define_flags()
  command.start_action("busy", run, resumes=False)
