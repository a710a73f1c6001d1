"""Measures the cells of a comparison: their answers and times; those in the work directory are reused."""

import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.compare.encoding import EncodingEngine, Encodings
from experiments.compare.grid import REFERENCE, Cell
from experiments.question_sets import Question
from experiments.shared import kept, machine
from experiments.shared.subject import Subject
from himap_jax.engine.capacity import BatchSizes
from himap_jax.engine.engine import Engine, GenerationConfig
from himap_jax.errors import UserError
from himap_jax.inputs import Inputs
from himap_jax.pruning.schedule import Schedule
from himap_jax.run import contract, output, prompts
from himap_jax.run.answering import Answerer


@dataclasses.dataclass(frozen=True)
class Runner:
  """Runs the cells of one comparison.

  Attributes:
    settings: all that answers and times depend on besides the cell, whose schedule is part of the file names.
    encoding_bytes: memory on the host for encoded pictures, which all cells share.
  """

  subject: Subject
  workdir: pathlib.Path
  settings: Mapping[str, Any]
  generation: GenerationConfig
  encoding_bytes: int = 0

  def answer(self, cell: Cell, *, repeat: int = 0) -> dict[str, dict[str, Any]]:
    """Answers the remaining questions; returns all output rows by id. Every repeat has a seed of its own."""
    generation = dataclasses.replace(self.generation, seed=self.generation.seed + repeat)
    name = f"{cell.file_name}.repeat{repeat}" if repeat else cell.file_name
    path = self.workdir / "answers" / f"{name}.jsonl"
    return self._rows(path, self.subject.questions, cell, generation, emit="counts")

  def show(self, cell: Cell, questions: Sequence[Question]) -> dict[str, dict[str, Any]]:
    """As `answer`, of some questions, with their kept image tokens."""
    path = self.workdir / "shown" / f"{cell.file_name}.jsonl"
    return self._rows(path, questions, cell, self.generation, emit="kept")

  def _rows(
    self, path: pathlib.Path, questions: Sequence[Question], cell: Cell, generation: GenerationConfig, *, emit: str
  ) -> dict[str, dict[str, Any]]:
    subject = self.subject
    if not questions:
      return {}
    path.parent.mkdir(exist_ok=True)
    if not path.exists() or path.read_bytes().count(b"\n") < len(questions):
      asked = [prompts.Prompt(q.id, (str(q.image.absolute()),), q.question) for q in questions]
      settings = self.settings | {"seed": generation.seed, "emit": [emit]}
      wanted = contract.Contract(path, settings, prompts.Prompts.of(asked), advice="use another --workdir")
      with output.Output(wanted, resume=True) as rows:
        engine = self._engine(cell.schedule, generation)
        Answerer(subject.processor, subject.batcher, engine, frozenset({emit})).answer_all(rows)
    return {row["id"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}

  def _engine(self, schedule: Schedule, generation: GenerationConfig) -> Engine:
    batch_sizes = BatchSizes(self.subject.batch_size, self.subject.batch_size)
    make = functools.partial(EncodingEngine, self._encodings)
    return self.subject.loaded.engine(schedule, generation, batch_sizes, make=make)

  @functools.cached_property
  def _encodings(self) -> Encodings:
    return Encodings(self.subject.loaded.model, self.encoding_bytes)

  def time(self, cell: Cell) -> dict[str, Any]:
    """Times a cell once; returns the result of `measure_times`, or nothing without repeats."""
    repeats = self.settings["timing"]["repeats"]

    def measure() -> dict[str, Any]:
      engine = self._reference if cell.schedule == Schedule() else self._timed(cell.schedule)
      return measure_times(self._reference, engine, self._timing_inputs, repeats=repeats)

    path = self.workdir / "timings" / f"{cell.file_name}.{self._machine}.json"
    path.parent.mkdir(exist_ok=True)
    return kept.json_of(path, measure) if repeats else {}

  @functools.cached_property
  def _machine(self) -> str:
    """What a time depends on besides the settings, in short."""
    code = machine.checksum_of_library(pathlib.Path(__file__).parent.glob("*.py"))
    own = [machine.processor(), jax.devices()[0].device_kind, machine.versions("jax"), code]
    return hashlib.sha256(json.dumps(own).encode()).hexdigest()[:8]

  @functools.cached_property
  def _reference(self) -> Engine:
    return self._timed(Schedule())

  def _timed(self, schedule: Schedule) -> Engine:
    new_tokens = self.settings["timing"]["new_tokens"]
    return Engine(
      self.subject.loaded.model, schedule, GenerationConfig(new_tokens, seed=self.subject.seed, ignore_eos=True)
    )

  @functools.cached_property
  def _timing_inputs(self) -> Inputs:
    batch_size = self.settings["timing"]["batch_size"]
    _, examples, buckets = zip(*itertools.islice(self.subject.examples("timing"), batch_size), strict=True)
    return self.subject.batcher.pack(examples, bucket=max(buckets), batch_size=batch_size)


class Measured(NamedTuple):
  """What was measured of the cells that ran, by their labels.

  Attributes:
    answers: output rows, by id.
    timings: of `measure_times`.
    shown: output rows of the examples, with kept tokens, by id.
    repeats: `answers` with further seeds, of cells that use chance.
  """

  answers: dict[str, dict[str, Any]]
  timings: dict[str, dict[str, Any]]
  shown: dict[str, dict[str, Any]]
  repeats: dict[str, list[dict[str, Any]]]


def run_cells(runner: Runner, cells: Sequence[Cell], examples: Sequence[Question], num_seeds: int) -> Measured:
  """Runs the cells that have a schedule; `UserError` if no question has an answer without pruning."""
  measured = Measured({}, {}, {}, {})
  for number, cell in enumerate(cells, start=1):
    print(f"[{number}/{len(cells)}] {cell.label}{f': {cell.note}' if cell.note else ''}", flush=True)
    if cell.schedule is None:
      continue
    measured.answers[cell.label] = runner.answer(cell)
    if cell.method == REFERENCE:
      report_errors(measured.answers[cell.label])
    measured.shown[cell.label] = runner.show(cell, examples)
    measured.timings[cell.label] = runner.time(cell)
    if cell.uses_chance:
      measured.repeats[cell.label] = [runner.answer(cell, repeat=repeat) for repeat in range(1, num_seeds)]
  return measured


def report_errors(rows: Mapping[str, Mapping[str, Any]]) -> None:
  """Says how many questions have no answer, which counts as wrong; raises `UserError` if none has one."""
  bad = [row for row in rows.values() if row["error"] is not None]
  if not bad:
    return
  first = f"{bad[0]['id']}: {bad[0]['error']}"
  text = f"{len(bad)} questions have no answer; the first, {first}" if bad[1:] else f"1 question has no answer, {first}"
  if len(bad) == len(rows):
    raise UserError(text)
  print(text, file=sys.stderr)


def measure_times(reference: Engine, engine: Engine, inputs: Inputs, *, repeats: int) -> dict[str, Any]:
  """Runs an engine and a reference in turns on a batch, after a first run of each that compiles and does not count.

  Returns medians over the turns of the ratios and of this engine's seconds, `compile_seconds` of its programs (of
  reading them, if cached), and the device.
  """
  _, *turns = [[run(inputs, range(len(inputs.tokens))) for run in (reference, engine)] for _ in range(repeats + 1)]
  times = np.array([[(result.prefill_seconds, result.decode_seconds) for result in turn] for turn in turns])
  ratios, seconds = np.median(times[:, 1] / times[:, 0], axis=0), np.median(times[:, 1], axis=0)
  names, compiling = ("prefill_ratio", "decode_ratio", "prefill_seconds", "decode_seconds"), engine.programs.seconds
  measured = dict(zip(names, [*ratios.tolist(), *seconds.tolist()], strict=True))
  return measured | {"compile_seconds": compiling, "device": jax.devices()[0].device_kind}
