"""Trials: each has a seed of its own, can be repeated alone, and is counted by its outcome."""

import collections
import contextlib
import dataclasses
import json
import pathlib
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping

import numpy as np

import checkpoints_convert
from experiments.shared import machine
from himap_jax.run import command
from himap_jax.run.progress import Progress

FAILED = "failed"

Trial = Callable[[np.random.Generator, pathlib.Path], str | Mapping[str, int]]


@dataclasses.dataclass(frozen=True)
class Part:
  """A part of the campaign.

  Attributes:
    promise: what holds in every trial, a sentence.
    prepare: makes, in a directory that is kept, what all trials share, and returns the trial: `(random, directory)`,
      the directory empty, to the outcome, a few words, or to how many inputs had which. A trial that finds the promise
      broken raises.
    inputs: that a trial tries.
    summary: of what trials measured, from the directory that they share.
  """

  promise: str
  prepare: Callable[[pathlib.Path], Trial]
  inputs: int = 1
  summary: Callable[[pathlib.Path], str] | None = None


def run(part: Part, workdir: pathlib.Path, *, num_trials: int, seed: int, only: int | None = None) -> list[dict]:
  """Runs the trials that are missing and returns all; or runs one `only`, again, and returns it.

  Raises:
    UserError: the directory holds trials of another seed, or of other code.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  if only is None:  # which may repeat a trial of older code
    others = [
      *pathlib.Path(__file__).parent.glob("*.py"),
      *pathlib.Path(checkpoints_convert.__file__).parent.rglob("*.py"),
    ]
    settings = {"seed": seed, "code": machine.checksum_of_library(others)}
    command.check_settings(workdir / "settings.json", settings, advice="use another --workdir")
  path = workdir / "trials.jsonl"
  is_new = only is not None or not path.exists()
  done = [] if is_new else [json.loads(line) for line in _whole_lines(path)]
  numbers = range(len(done), num_trials) if only is None else [only]
  if not numbers:
    return done
  (workdir / "shared").mkdir(exist_ok=True)
  trial = part.prepare(workdir / "shared")
  with contextlib.ExitStack() as stack:
    progress = stack.enter_context(Progress(len(numbers), "trial", workdir.name))
    lines = stack.enter_context(path.open("a", encoding="utf-8")) if only is None else None
    for number in numbers:
      done.append(_one(trial, number, seed))
      if lines is not None:
        lines.write(json.dumps(done[-1]) + "\n")
        lines.flush()
      if done[-1]["outcome"] == FAILED:
        progress.print(f"trial {number} failed; repeat it with --only={number}\n{done[-1]['error']}")
      progress.update()
  return done


def _whole_lines(path: pathlib.Path) -> list[str]:
  """The lines of a file, from which a last one is removed that was interrupted."""
  text = path.read_text(encoding="utf-8")
  whole = text[: text.rfind("\n") + 1]
  if whole != text:
    path.write_text(whole, encoding="utf-8")
  return whole.splitlines()


def _one(trial: Trial, number: int, seed: int) -> dict:
  start = time.monotonic()
  with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
    try:
      result = {"outcome": trial(np.random.default_rng([seed, number]), pathlib.Path(directory))}
    except Exception:
      result = {"outcome": FAILED, "error": traceback.format_exc()}
  return {"trial": number, "seconds": round(time.monotonic() - start, 2)} | result


def table(part: Part, done: list[dict]) -> str:
  """A Markdown table of outcomes."""
  counts = collections.Counter()
  for row in done:
    counts.update([row["outcome"]] if isinstance(row["outcome"], str) else row["outcome"])
  lines = [f"{part.promise} {len(done) * part.inputs:,} tried.", "", "| outcome | count |", "|---|---|"]
  return "\n".join([*lines, *(f"| {outcome} | {count:,} |" for outcome, count in counts.most_common())])
