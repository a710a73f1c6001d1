"""Times a job of rows whose answers have very different lengths: slots against static batches and transformers.

    python -m experiments.speed.throughput --geometry=demo --num_rows=300

A third of the answers is a word, a third a sentence, a third a paragraph, in random order; their lengths are given. The
sides run in separate processes on the same random weights and take turns. Static batches have as many rows as there are
slots, and each is decoded until its longest answer ends. Repeating an interrupted command continues with the turns not
yet measured. Needs PyTorch: `pip install -e '.[test]'`.
"""

import contextlib
import dataclasses
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from experiments.shared import kept, machine, study, tabular
from experiments.shared.geometries import GEOMETRIES
from experiments.shared.lengths import draw_lengths
from experiments.speed import measure
from experiments.speed.side import Job, Scenario
from experiments.speed.worker import Worker
from himap_jax.pruning.methods import METHODS
from himap_jax.run import flag_values

Result = Mapping[str, float]


def define_flags() -> None:
  flags.DEFINE_enum("geometry", "demo", list(GEOMETRIES), "Model sizes.")
  flags.DEFINE_enum("method", "himap", list(METHODS), "The pruning method of our sides.")
  flags.DEFINE_integer("num_rows", 300, "Rows of the job.", lower_bound=3)
  flags.DEFINE_integer("num_instruction_tokens", 60, "Text tokens after the image.", lower_bound=1)
  flags.DEFINE_integer("batch_size", 16, "Slots, and rows of a static batch.", lower_bound=2)
  flags.DEFINE_integer(
    "prefill_batch_size",
    1,
    "Rows that are prefilled together for slots; on a CPU the engine chooses one.",
    lower_bound=1,
  )
  flags.DEFINE_list("pytorch_batch_sizes", ["4", "16"], "Rows of batches of transformers.")
  flags.DEFINE_integer("turns", 3, "Repetitions per side, in turns.", lower_bound=1)
  flags.DEFINE_string("weights_dir", "/dev/shm", "Directory of the random weights during the run.")


def run(values: Any) -> study.Report:
  measure.check_geometry(values.geometry)
  scenario = Scenario(values.geometry, values.num_instruction_tokens, batch_size=1, num_new_tokens=1)
  lengths, slots, method = draw_lengths(values.num_rows), values.batch_size, values["method"].value
  jobs = {
    f"{method}, {slots} slots": (method, Job(scenario, lengths, values.prefill_batch_size, slots)),
    f"{method}, batches of {slots}": (method, Job(scenario, lengths, slots, slots)),
    **{
      f"transformers, batches of {size}": ("transformers", Job(scenario, lengths, size, size))
      for size in flag_values.numbers(values["pytorch_batch_sizes"], int)
    },
  }
  described = {name: dataclasses.asdict(job) for name, (_, job) in jobs.items()}
  workdir = study.open_workdir(jobs=described, **measure.provenance())
  results = run_in_turns(jobs, values.turns, workdir, pathlib.Path(values.weights_dir))
  rows = summarize(results, len(lengths))
  count = f"{machine.processor()}, {len(lengths)} rows with {sum(lengths)} tokens, medians of {values.turns} turns"
  return study.Report(count, markdown(rows), {"throughput": rows})


def run_in_turns(
  jobs: Mapping[str, tuple[str, Job]], turns: int, workdir: pathlib.Path, weights_dir: pathlib.Path
) -> dict[str, list[Result]]:
  """The results of every job, a side's name and what it runs, turn by turn.

  Each turn of a side is a file in `workdir`. The first is a shorter job, which compiles.
  """
  geometry = next(iter(jobs.values()))[1].scenario.geometry
  with contextlib.ExitStack() as stack:
    weights = stack.enter_context(measure.random_weights(geometry, weights_dir))
    workers: dict[str, Worker] = {}
    has_compiled: set[str] = set()

    def call(name: str, turn: int) -> Result:
      own, job = jobs[name]
      if own not in workers:
        workers[own] = stack.enter_context(Worker(own, GEOMETRIES[geometry], weights))
      if turn and name not in has_compiled:  # in a run that was interrupted
        workers[own].call("job", shortened(job))
      has_compiled.add(name)
      result = workers[own].call("job", job if turn else shortened(job))
      print(f"turn {turn} of {turns}: {name}: {result['seconds']:.1f} s", flush=True)
      return result

    results: dict[str, list[Result]] = {name: [] for name in jobs}
    for turn in range(turns + 1):
      for name, own in results.items():
        own.append(kept.json_of(workdir / f"{kept.file_name(name)}-{turn}.json", call, name, turn))
  return results


def shortened(job: Job) -> Job:
  """A job of the same programs: two batches, with one answer of the greatest length."""
  longest, *lengths = sorted(job.lengths, reverse=True)[: 2 * job.decode]
  return dataclasses.replace(job, lengths=(longest, *(min(4, length) for length in lengths)))


def summarize(results: Mapping[str, Sequence[Result]], num_rows: int) -> list[tabular.Row]:
  """A row for every side, with medians over the turns but the first, which gives the number of programs."""
  rows = []
  for name, (first, *turns) in results.items():
    medians = {figure: statistics.median(turn[figure] for turn in turns) for figure in turns[0]}
    seconds = medians["seconds"]
    rows.append(
      {
        "side": name,
        "seconds": seconds,
        "rows/s": num_rows / seconds,
        "time of slots ÷ its time": (rows[0]["seconds"] if rows else seconds) / seconds,
        "slots in use": medians.get("slots in use"),
        "prefill, s": medians.get("prefill seconds"),
        "programs": first.get("programs"),
      }
    )
  return rows


def markdown(rows: Sequence[tabular.Row]) -> list[str]:
  formats = {"seconds": ".1f", "rows/s": ".2f", "time of slots ÷ its time": ".2f", "slots in use": ".1%"}
  formats |= {"prefill, s": ".1f", "programs": "d"}

  def cell(row: tabular.Row, name: str) -> str:
    return "–" if row[name] is None else format(row[name], formats.get(name, ""))

  return tabular.markdown(tuple(rows[0]), ([cell(row, name) for name in row] for row in rows))


if __name__ == "__main__":
  study.start("speed.throughput", define_flags, run, has_subject=False)
