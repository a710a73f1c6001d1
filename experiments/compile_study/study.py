"""Runs what has not been measured yet: every variant with an empty compilation cache, then in turns with a filled one."""

import dataclasses
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

from experiments.compile_study import measure
from experiments.compile_study.measure import Place, Setting
from experiments.compile_study.variants import VARIANTS
from experiments.shared import kept
from himap_jax.run.progress import Progress

Measurement = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Results:
  """What `measure` says of every variant.

  Attributes:
    processes: the first with an empty compilation cache; the others, one a turn, found their programs in it.
    tpu: of the TPU's compiler.
  """

  processes: dict[str, list[Measurement]]
  tpu: dict[str, Measurement]


def run(
  variants: Sequence[str], setting: Setting, place: Place | None, *, turns: int, workdir: pathlib.Path
) -> Results:
  """Measures variants and asks the TPU's compiler about them, and goes on from what the work directory holds.

  Args:
    variants: keys of `VARIANTS`.
    setting: what all are measured with.
    place: what is compiled for TPU; nothing when None.
    turns: measurements of every variant after the first.
    workdir: a file for every measurement and report, and the compilation caches.
  """

  def measured(name: str, turn: int) -> Measurement:
    cache = workdir / "compiled" / name
    if turn == 0:
      shutil.rmtree(cache, ignore_errors=True)
    return measure.in_own_process(name, setting, cache)

  results = Results({name: [] for name in variants}, {})
  steps = [(name, turn) for turn in range(turns + 1) for name in variants]
  with Progress(len(steps), "process", "measuring") as progress:
    for name, turn in steps:
      path = workdir / f"{name}-{turn}.json"
      results.processes[name].append(kept.json_of(path, lambda name=name, turn=turn: measured(name, turn)))
      progress.update()
  reported = [name for name in variants if VARIANTS[name].can_be_abstract and VARIANTS[name].is_bucketed]
  if place is not None:
    with Progress(len(reported), "variant", "compiling for TPU") as progress:
      for name in reported:
        path = workdir / f"{name}-tpu.json"
        results.tpu[name] = kept.json_of(path, lambda name=name: measure.for_tpu(name, place))
        progress.update()
  return results
