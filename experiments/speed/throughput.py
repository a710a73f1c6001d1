"""Times a job of rows whose answers have very different lengths: slots against static batches and transformers.

    python -m experiments.speed.throughput --geometry=demo --num_rows=300

A third of the answers is a word, a third a sentence, a third a paragraph, in random order; their lengths are given. The
sides run in separate processes on the same random weights and take turns. Static batches have as many rows as there are
slots, and each is decoded until its longest answer ends. Needs PyTorch: `pip install -e '.[test]'`.
"""

import contextlib
import dataclasses
import pathlib
import statistics
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax import tree

from experiments.shared import geometries, machine, tabular
from experiments.speed import measure
from experiments.speed.side import Job, Scenario
from experiments.speed.worker import Worker
from himap_jax.model.network import abstract_params
from himap_jax.pruning.methods import METHODS
from himap_jax.run import command

_GEOMETRY = flags.DEFINE_enum("geometry", "demo", list(geometries.GEOMETRIES), "Model sizes.")
_METHOD = flags.DEFINE_enum("method", "himap", list(METHODS), "The pruning method of our sides.")
_NUM_ROWS = flags.DEFINE_integer("num_rows", 300, "Rows of the job.", lower_bound=3)
_NUM_INSTRUCTION_TOKENS = flags.DEFINE_integer("num_instruction_tokens", 60, "Text tokens after the image.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Slots, and rows of a static batch.", lower_bound=2)
_PREFILL_BATCH_SIZE = flags.DEFINE_integer("prefill_batch_size", 4, "Rows prefilled together for slots.", lower_bound=1)
_PYTORCH = flags.DEFINE_list("pytorch_batch_sizes", ["4", "16"], "Batches of transformers; the fastest size counts.")
_TURNS = flags.DEFINE_integer("turns", 3, "Turns of each side.", lower_bound=1)
_WEIGHTS_DIR = flags.DEFINE_string("weights_dir", "/dev/shm", "Directory of the random weights during the run.")

LENGTHS = ((1, 3), (8, 24), (64, 128))  # tokens of a word, a sentence and a paragraph


def draw_lengths(num_rows: int, *, seed: int = 0) -> tuple[int, ...]:
  """As many of each kind, in random order."""
  rng = np.random.default_rng(seed)
  lengths = [rng.integers(*LENGTHS[row % len(LENGTHS)], endpoint=True) for row in range(num_rows)]
  return tuple(map(int, rng.permutation(lengths)))


def run() -> int:
  geometry = _GEOMETRY.value
  scenario = Scenario(geometry, _NUM_INSTRUCTION_TOKENS.value, 1, 1)
  lengths, slots = draw_lengths(_NUM_ROWS.value), _BATCH_SIZE.value
  jobs = {
    f"{_METHOD.value}, {slots} slots": (_METHOD.value, Job(scenario, lengths, _PREFILL_BATCH_SIZE.value, slots)),
    f"{_METHOD.value}, batches of {slots}": (_METHOD.value, Job(scenario, lengths, slots, slots)),
    **{
      f"transformers, batches of {size}": ("transformers", Job(scenario, lengths, size, size))
      for size in command.numbers(_PYTORCH, int)
    },
  }
  results = run_in_turns(geometry, jobs)
  print(f"{machine.processor()}: {len(lengths)} rows, {sum(lengths)} tokens; medians of {_TURNS.value} turns.\n")
  print("\n".join(table(results, len(lengths))))
  return 0


def run_in_turns(geometry: str, jobs: dict[str, tuple[str, Job]]) -> dict[str, list[dict[str, float]]]:
  """The results of every job, turn by turn, after a short job of each that compiles."""
  leaves = tree.leaves(abstract_params(geometries.model_of(geometry), jnp.bfloat16))
  num_bytes = 2 * sum(leaf.size for leaf in leaves)
  with contextlib.ExitStack() as stack:
    with command.user_error(f"cannot write the weights into {_WEIGHTS_DIR.value}; name another directory"):
      weights = stack.enter_context(measure.random_file(pathlib.Path(_WEIGHTS_DIR.value), num_bytes))
    workers: dict[str, Worker] = {}
    for side, _ in jobs.values():
      if side not in workers:
        workers[side] = stack.enter_context(Worker(side, geometries.GEOMETRIES[geometry], weights))
    results: dict[str, list[dict[str, float]]] = {name: [] for name in jobs}
    for turn in range(_TURNS.value + 1):
      for name, (side, job) in jobs.items():
        results[name].append(workers[side].call("job", job if turn else _shortened(job)))
        print(f"turn {turn}: {name}: {results[name][-1]['seconds']:.1f} s", flush=True)
  return results


def _shortened(job: Job) -> Job:
  """A job of the same programs: two batches, with one answer of the greatest length."""
  longest, *lengths = sorted(job.lengths, reverse=True)[: 2 * job.decode]
  return dataclasses.replace(job, lengths=(longest, *(min(4, length) for length in lengths)))


def table(results: dict[str, list[dict[str, float]]], num_rows: int) -> Sequence[str]:
  """A line for every side; programs are those of the turn that compiles, all else is of the others."""
  first = next(iter(results))
  medians = {
    name: {figure: statistics.median(turn[figure] for turn in turns) for figure in turns[0]}
    for name, (_, *turns) in results.items()
  }
  rows = []
  for name, own in medians.items():
    seconds, programs = own["seconds"], results[name][0].get("programs")
    rows.append(
      (
        name,
        f"{seconds:.1f}",
        f"{num_rows / seconds:.2f}",
        f"{medians[first]['seconds'] / seconds:.2f}",
        "" if programs is None else f"{own['slots in use']:.1%}",
        "" if programs is None else f"{own['prefill seconds']:.1f}",
        "" if programs is None else str(programs),
      )
    )
  header = "side", "seconds", "rows/s", "time of slots ÷ its time", "slots in use", "prefill, s", "programs"
  return tabular.markdown(header, rows)


if __name__ == "__main__":
  app.run(lambda argv: command.execute("throughput", argv, run, resumes=False))
