"""Runs what has not been measured yet: every variant with an empty compilation cache, then in turns with a filled one."""

import dataclasses
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

from experiments.compile_study import measure, reports
from experiments.compile_study.measure import Measurement, Setting
from experiments.compile_study.reports import Place, Report
from experiments.compile_study.variants import VARIANTS
from experiments.shared import kept
from himap_jax.run.progress import Progress


@dataclasses.dataclass(frozen=True)
class Results:
  """What is known.

  Attributes:
    cold: by variant, with an empty compilation cache.
    turns: by variant, the processes that found the programs in it.
    reports: by variant, of the TPU's compiler.
  """

  cold: dict[str, Measurement]
  turns: dict[str, list[Measurement]]
  reports: dict[str, Report]


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
  results = Results({}, {name: [] for name in variants}, {})
  steps = [(name, turn) for turn in range(turns + 1) for name in variants]
  with Progress(len(steps), "process", "measuring") as progress:
    for name, turn in steps:
      cache = workdir / "compiled" / name

      def measured(name: str = name, cache: pathlib.Path = cache, is_cold: bool = turn == 0) -> dict[str, Any]:
        if is_cold:
          shutil.rmtree(cache, ignore_errors=True)
        return dataclasses.asdict(measure.in_own_process(name, setting, cache))

      measurement = Measurement(**kept.json_of(workdir / f"{name}-{turn}.json", measured))
      if turn == 0:
        results.cold[name] = measurement
      else:
        results.turns[name].append(measurement)
      progress.update()
  if place is not None:
    reported = [name for name in variants if VARIANTS[name].can_be_abstract and VARIANTS[name].is_bucketed]
    with Progress(len(reported), "variant", "compiling for TPU") as progress:
      for name in reported:
        content = kept.json_of(
          workdir / f"{name}-tpu.json", lambda name=name: dataclasses.asdict(reports.report(name, place))
        )
        results.reports[name] = Report(**content)
        progress.update()
  return results
