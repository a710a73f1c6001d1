"""Measures scenarios, all sides in turns; one file of results per scenario allows resuming."""

import contextlib
import dataclasses
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import tree

from experiments.shared import geometries, kept, machine
from experiments.speed import side
from experiments.speed.side import Scenario
from experiments.speed.worker import CannotRun, Worker
from himap_jax.errors import check_supported
from himap_jax.model.network import abstract_params
from himap_jax.run.progress import Progress
from himap_jax.run.user_errors import user_error

# By side: the seconds of each figure, turn by turn, or why there are none.
Result = dict[str, dict[str, Any]]

BLOCK_BYTES = 64 << 20
# Bytes; far beyond any cache, so that weights that share memory take as long to read as separate ones.
LARGEST_FILE = 4 << 30


def provenance() -> dict[str, str]:
  """What the measured times depend on besides what is measured."""
  ran = [pathlib.Path(side.__file__).with_name(name) for name in ("side.py", "ours.py", "pytorch.py")]
  code = machine.checksum_of_library([*ran, pathlib.Path(geometries.__file__)])
  return {"processor": machine.processor(), "code": code, **machine.versions("jax", "torch", "transformers")}


def check_geometry(name: str) -> None:
  """Raises `UserError` unless both sides have as many image tokens: a LLaVA with pictures of the tower's own size."""
  llavas = {key: own["vision_config"] for key, own in geometries.GEOMETRIES.items() if own["model_type"] == "llava"}
  known = [
    key for key, tower in llavas.items() if geometries.image_shape(geometries.model_of(key))[0] == tower["image_size"]
  ]
  check_supported(name, known, where="--geometry", what="comparing PyTorch's LLaVA with")


@contextlib.contextmanager
def random_file(directory: pathlib.Path, num_bytes: int) -> Iterator[pathlib.Path]:
  """Yields a file of random bfloat16 numbers of either sign and magnitude 0.008 to 0.016; `OSError` without space.

  The file has no name, so that nothing is left of it however the process ends.
  """
  numbers = np.random.default_rng(0).integers(0, 1 << 16, BLOCK_BYTES // 2, np.uint16)
  block = ((numbers & 0x807F) | (120 << 7)).tobytes()  # sign and mantissa at random, the exponent of 2 ** -7
  num_bytes = min(num_bytes, LARGEST_FILE)
  with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
    os.posix_fallocate(file.fileno(), 0, num_bytes)
    for start in range(0, num_bytes, BLOCK_BYTES):
      file.write(memoryview(block)[: num_bytes - start])
    yield pathlib.Path(f"/proc/{os.getpid()}/fd/{file.fileno()}")


@contextlib.contextmanager
def random_weights(geometry: str, directory: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a `random_file` as large as a geometry's weights; raises `UserError` if it cannot be written."""
  num_weights = sum(leaf.size for leaf in tree.leaves(abstract_params(geometries.model_of(geometry), jnp.bfloat16)))
  with contextlib.ExitStack() as stack:
    with user_error(f"cannot write the weights into {directory}; name another directory"):
      path = stack.enter_context(random_file(directory, 2 * num_weights))
    yield path


def run(
  scenarios: Sequence[Scenario],
  sides: Sequence[str],
  *,
  turns: int,
  at_once: int,
  workdir: pathlib.Path,
  weights_dir: pathlib.Path,
) -> dict[Scenario, Result]:
  """The results of scenarios of one geometry, each a file in `workdir`; missing ones are measured.

  The sides are those of `side.make`, each with as many turns; `at_once` of them load and compile concurrently. Raises
  `UserError` if the random weights cannot be written into `weights_dir`, and `RuntimeError` if a side failed, with
  earlier scenarios kept.
  """
  paths = {scenario: workdir / f"{'-'.join(map(str, dataclasses.astuple(scenario)))}.json" for scenario in scenarios}
  todo = [scenario for scenario, path in paths.items() if not path.exists()]
  with contextlib.ExitStack() as stack:
    if todo:
      geometry = todo[0].geometry
      weights = stack.enter_context(random_weights(geometry, weights_dir))
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
