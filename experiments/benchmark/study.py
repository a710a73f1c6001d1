"""Measures scenarios: all sides in turns, one file of results a scenario, and what is measured is not measured again."""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax.numpy as jnp
from jax import tree
from tqdm import tqdm

from experiments import geometries, kept
from experiments.benchmark.scenarios import Scenario
from experiments.benchmark.weights import random_file
from experiments.benchmark.worker import CannotRun, Worker
from experiments.geometries import GEOMETRIES
from himap_jax.llava import abstract_params


def run(
  geometry: str,
  scenarios: Sequence[Scenario],
  sides: Sequence[str],
  *,
  turns: int,
  at_once: int,
  workdir: pathlib.Path,
  weights_dir: pathlib.Path,
) -> None:
  """Measures the scenarios of one geometry that have not been measured yet; `at_once` sides load and compile together.

  Raises:
    OSError: the weights or the results cannot be written.
    RuntimeError: a side failed; what was measured before is kept.
  """
  todo = [scenario for scenario in scenarios if not result_path(workdir, scenario).exists()]
  if not todo:
    return
  params = abstract_params(geometries.model_of(geometry), jnp.bfloat16)
  num_bytes = sum(2 * math.prod(leaf.shape) for leaf in tree.leaves(params))
  with random_file(weights_dir, num_bytes) as weights, contextlib.ExitStack() as stack:
    pool = stack.enter_context(ThreadPoolExecutor(at_once))

    def begin(name: str) -> Worker:
      return stack.enter_context(Worker(name, GEOMETRIES[geometry], weights))

    workers = dict(zip(sides, pool.map(begin, sides), strict=True))
    for scenario in tqdm(todo, desc=geometry, unit="scenario", disable=None):
      kept.json_of(
        result_path(workdir, scenario), lambda scenario=scenario: measure(scenario, workers, pool, turns=turns)
      )


def result_path(workdir: pathlib.Path, scenario: Scenario) -> pathlib.Path:
  """Where a scenario's results are."""
  return workdir / f"{'-'.join(map(str, dataclasses.astuple(scenario)))}.json"


def measure(
  scenario: Scenario, workers: dict[str, Worker], pool: ThreadPoolExecutor, *, turns: int
) -> dict[str, dict[str, Any]]:
  """For every side the seconds of each figure, turn by turn, or why there are none.

  All sides are prepared first; then they take turns, A B C A B C, so that a slow minute of the machine meets all.

  Raises:
    RuntimeError: a side failed; nothing of the scenario is kept.
  """
  results: dict[str, dict[str, Any]] = {
    name: {"device": worker.device, "turns": []} for name, worker in workers.items()
  }

  def attempt(name: str, action: Callable[[Worker], dict[str, Any]]) -> None:
    if "cannot" not in results[name]:
      try:
        results[name] |= action(workers[name])
      except CannotRun as error:
        results[name] = {"cannot": str(error)}

  list(pool.map(lambda name: attempt(name, lambda worker: {"prepare": worker.prepare(scenario)}), workers))
  for _ in range(turns):
    for name in workers:
      attempt(name, lambda worker, name=name: {"turns": [*results[name]["turns"], worker.turn()]})
  for name in workers:
    attempt(name, lambda worker: {"peak_bytes": worker.peak_bytes(), **worker.accounting()})
  return results
