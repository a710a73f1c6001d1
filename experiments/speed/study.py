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

from experiments.shared import geometries, kept
from experiments.speed import side
from experiments.speed.side import Scenario
from experiments.speed.weights import random_file
from experiments.speed.worker import CannotRun, Worker
from himap_jax.model.network import abstract_params
from himap_jax.run import command
from himap_jax.run.progress import Progress


@dataclasses.dataclass(frozen=True)
class Plan:
  """How scenarios are measured: by which sides, and how many turns each takes.

  Attributes:
    sides: see `side.make`.
    turns: of each side.
    at_once: sides that load and compile together.
    workdir: a file of results for every scenario.
    weights_dir: where the random weights lie.
  """

  sides: Sequence[str]
  turns: int
  at_once: int
  workdir: pathlib.Path
  weights_dir: pathlib.Path


def run(geometry: str, scenarios: Sequence[Scenario], plan: Plan) -> None:
  """Measures the scenarios of one geometry that have not been measured yet.

  Raises:
    UserError: the weights cannot be written.
    RuntimeError: a side failed; what was measured before is kept.
  """
  todo = [scenario for scenario in scenarios if not result_path(plan.workdir, scenario).exists()]
  if not todo:
    return
  params = abstract_params(geometries.model_of(geometry), jnp.bfloat16)
  num_bytes = sum(2 * math.prod(leaf.shape) for leaf in tree.leaves(params))
  with contextlib.ExitStack() as stack:
    with command.user_error(f"cannot write the weights into {plan.weights_dir}; name another directory"):
      weights = stack.enter_context(random_file(plan.weights_dir, num_bytes))
    pool = stack.enter_context(ThreadPoolExecutor(plan.at_once))

    def begin(name: str) -> Worker:
      return stack.enter_context(Worker(name, geometries.GEOMETRIES[geometry], weights))

    workers = dict(zip(plan.sides, pool.map(begin, plan.sides), strict=True))
    progress = stack.enter_context(Progress(len(todo), "scenario", geometry))
    for scenario in todo:
      kept.json_of(
        result_path(plan.workdir, scenario),
        lambda scenario=scenario: measure(scenario, workers, pool, turns=plan.turns),
      )
      progress.update()


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

  def prepare(worker: Worker) -> dict[str, Any]:
    return {"prepare": side.seconds(lambda: worker.call("prepare", scenario))}

  list(pool.map(lambda name: attempt(name, prepare), workers))
  for _ in range(turns):
    for name in workers:
      attempt(name, lambda worker, name=name: {"turns": [*results[name]["turns"], worker.call("turn")]})
  for name in workers:
    attempt(name, lambda worker: {"peak_bytes": worker.call("peak_bytes"), **worker.call("accounting")})
  return results
