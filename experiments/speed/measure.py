"""Measures scenarios, all sides in turns; one file of results per scenario allows resuming."""

import contextlib
import dataclasses
import json
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

# By side: the seconds of each figure, turn by turn, or why there are none.
Result = dict[str, dict[str, Any]]


def run(
  scenarios: Sequence[Scenario],
  sides: Sequence[str],
  *,
  turns: int,
  at_once: int,
  workdir: pathlib.Path,
  weights_dir: pathlib.Path,
) -> dict[Scenario, Result]:
  """The results of scenarios of one geometry; missing ones are measured.

  Args:
    sides: see `side.make`.
    turns: turns of each side.
    at_once: sides that load and compile concurrently.
    workdir: directory of a results file for every scenario.
    weights_dir: directory of the random weights.

  Raises:
    UserError: the weights cannot be written.
    RuntimeError: a side failed; earlier scenarios are kept.
  """
  paths = {scenario: workdir / f"{'-'.join(map(str, dataclasses.astuple(scenario)))}.json" for scenario in scenarios}
  todo = [scenario for scenario, path in paths.items() if not path.exists()]
  with contextlib.ExitStack() as stack:
    if todo:
      geometry = todo[0].geometry
      num_weights = sum(leaf.size for leaf in tree.leaves(abstract_params(geometries.model_of(geometry), jnp.bfloat16)))
      with command.user_error(f"cannot write the weights into {weights_dir}; name another directory"):
        weights = stack.enter_context(random_file(weights_dir, 2 * num_weights))
      pool = stack.enter_context(ThreadPoolExecutor(at_once))

      def start_worker(name: str) -> Worker:
        return stack.enter_context(Worker(name, geometries.GEOMETRIES[geometry], weights))

      workers = dict(zip(sides, pool.map(start_worker, sides), strict=True))
      progress = stack.enter_context(Progress(len(todo), "scenario", geometry))
    for scenario in todo:
      kept.json_of(paths[scenario], lambda scenario=scenario: measure(scenario, workers, pool, turns=turns))
      progress.update()
  return {scenario: json.loads(path.read_text()) for scenario, path in paths.items()}


def measure(scenario: Scenario, workers: dict[str, Worker], pool: ThreadPoolExecutor, *, turns: int) -> Result:
  """Measures one scenario; raises `RuntimeError`, and keeps nothing of it, if a side fails.

  All sides are prepared, then take turns, A B C A B C, so that a slow minute of the machine affects all.
  """
  results: Result = {name: {"device": worker.device, "turns": []} for name, worker in workers.items()}

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
    attempt(name, lambda worker: worker.call("accounting"))
  return results
