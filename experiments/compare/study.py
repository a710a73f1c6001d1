"""Runs a comparison from its settings to tables, plots and report; results in its work directory are reused."""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from experiments import question_sets
from experiments.compare import plots, report, tables
from experiments.compare.comparison import Comparison, PromptSizes, Row
from experiments.compare.grid import Cell, Grid, Shape
from experiments.question_sets import Question
from experiments.shared import kept, tabular
from himap_jax import checkpoint
from himap_jax.engine import accounting, sharding
from himap_jax.engine.batching import Batcher
from himap_jax.engine.engine import Engine, GenerationConfig
from himap_jax.errors import UserError
from himap_jax.generation import InputConfig
from himap_jax.inputs import Example, Inputs
from himap_jax.pruning.schedule import Schedule
from himap_jax.run import answering, command, contract, output, pictures, prompts


@dataclasses.dataclass(frozen=True)
class Timing:
  """How times are measured: questions in the batch, tokens decoded for each, and turns; 0 repeats disable timing."""

  batch_size: int = 1
  new_tokens: int = 16
  repeats: int = 5


@dataclasses.dataclass(frozen=True)
class StudyConfig:
  """Settings of a comparison; `generation.seed` also seeds the draw of questions and the bootstrap."""

  checkpoint: str
  question_set: str
  workdir: pathlib.Path
  output: pathlib.Path
  grid: Grid
  num_questions: int | None = None
  dtype: str = "float32"
  generation: GenerationConfig = GenerationConfig(max_new_tokens=8)
  inputs: InputConfig = InputConfig()
  timing: Timing = Timing()
  num_examples: int = 12
  num_strips: int = 4
  compilation_cache_dir: str = ""


class Runner:
  """Runs the cells of one comparison; the weights are read on first use."""

  def __init__(self, config: StudyConfig, opened: checkpoint.OpenCheckpoint, questions: Sequence[Question]):
    """Raises `UserError` if the model cannot take prompts of this form."""
    self._config, self._opened, self._questions = config, opened, questions
    self.processor = opened.prompts(config.inputs.prompt_template)
    new_tokens = max(config.generation.max_new_tokens, config.timing.new_tokens)
    image_shape, buckets = self.processor.image_shape, config.inputs.prompt_buckets
    self._batcher = Batcher(opened.config, image_shape, buckets=buckets, max_new_tokens=new_tokens)
    text, vision = opened.config.text, opened.config.vision
    self.shape = Shape(text.num_hidden_layers, self._batcher.num_image_tokens, vision.has_class_token)

  def answer(self, cell: Cell) -> dict[str, dict[str, Any]]:
    """Answers the remaining questions; returns all output rows by id."""
    path = self._config.workdir / "answers" / f"{cell.file_name}.jsonl"
    if not path.exists() or path.read_bytes().count(b"\n") < len(self._questions):
      asked = [prompts.Prompt(q.id, str(q.image.absolute()), q.question) for q in self._questions]
      wanted = contract.Contract(path, self.settings, asked, advice="use another --workdir")
      with output.Output(wanted, resume=True) as rows:
        engine, batch_size = self._engine(cell.schedule, self._config.generation), self._config.inputs.batch_size
        emit = frozenset({"tokens", "kept"})
        answering.Answerer(self.processor, self._batcher, engine, batch_size, emit).answer_all(rows)
    return {row["id"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}

  def time(self, cell: Cell) -> dict[str, Any]:
    """Times a cell once; returns the result of `measure_times`, or nothing without repeats."""
    repeats = self._config.timing.repeats

    def measure() -> dict[str, Any]:
      engine = self._reference if cell.schedule == Schedule() else self._timed(cell.schedule)
      return measure_times(self._reference, engine, self._timing_inputs, repeats=repeats)

    path = self._config.workdir / "timings" / f"{cell.file_name}.json"
    return kept.json_of(path, measure) if repeats else {}

  def prompt_sizes(self) -> PromptSizes:
    """Mean sizes of the questions that the model can take."""
    by_text = {question.question: question for question in self._questions}
    prepared = {text: self._prepare(question, blank=True) for text, question in by_text.items()}
    lengths = [prepared[q.question].num_text_tokens for q in self._questions if prepared[q.question]]
    model, num_text_tokens = accounting.model_sizes(self._opened.config), round(float(np.mean(lengths)))
    bytes_per_value = jnp.dtype(command.DTYPES[self._config.dtype]).itemsize
    return PromptSizes(model, self.shape.num_image_tokens, num_text_tokens, bytes_per_value)

  @functools.cached_property
  def settings(self) -> dict[str, Any]:
    """What answers and times depend on besides the cell, whose schedule is part of the file names."""
    config = self._config
    return {
      **{name: getattr(config, name) for name in ("checkpoint", "dtype", "question_set", "num_questions")},
      **dataclasses.asdict(config.generation),
      **dataclasses.asdict(config.inputs),
      "timing": dataclasses.asdict(config.timing),
      "weights": self._opened.digest(),
      "questions": question_sets.digest(self._questions),
    }

  @functools.cached_property
  def _loaded(self) -> checkpoint.LoadedModel:
    config, dtype = self._config, command.DTYPES[self._config.dtype]
    num_rows = math.gcd(config.inputs.batch_size, config.timing.batch_size)
    axes = sharding.choose_mesh(self._opened.config, self._opened.num_bytes(dtype), num_rows)
    return self._opened.restore(dtype=dtype, mesh=sharding.make_mesh(**axes))

  @functools.cached_property
  def _reference(self) -> Engine:
    return self._timed(Schedule())

  @functools.cached_property
  def _timing_inputs(self) -> Inputs:
    batch_size = self._config.timing.batch_size
    first = list(itertools.islice(filter(None, map(self._prepare, self._questions)), batch_size))
    if not first:
      raise UserError("no question can be prepared for timing")
    return self._batcher.pack(first, bucket=max(map(self._batcher.bucket, first)), batch_size=batch_size)

  def _prepare(self, question: Question, *, blank: bool = False) -> Example | None:
    """A prepared question, optionally with a blank picture; None where it fails, an error among the answers."""
    with contextlib.suppress(UserError):
      picture = Image.new("RGB", (64, 64)) if blank else pictures.load_image(question.image)
      example = self.processor.prepare(picture, question.question)
      self._batcher.bucket(example)
      return example

  def _timed(self, schedule: Schedule) -> Engine:
    new_tokens, seed = self._config.timing.new_tokens, self._config.generation.seed
    return self._engine(schedule, GenerationConfig(new_tokens, seed=seed, ignore_eos=True))

  def _engine(self, schedule: Schedule, generation: GenerationConfig) -> Engine:
    return Engine(self._loaded.model, schedule, generation, eos_token_ids=self._loaded.eos_token_ids)


def measure_times(reference: Engine, engine: Engine, inputs: Inputs, *, repeats: int) -> dict[str, Any]:
  """Runs an engine and a reference in turns on a batch, after a first run of each that compiles and does not count.

  Returns medians over the turns of the ratios and of this engine's seconds, `compile_seconds` of its programs (of
  reading them, if cached), and the device.
  """
  ids = ["timing"] * len(inputs.tokens)
  _, *turns = [[run(inputs, ids) for run in (reference, engine)] for _ in range(repeats + 1)]
  times = np.array([[(result.prefill_seconds, result.decode_seconds) for result in turn] for turn in turns])
  ratios, seconds = np.median(times[:, 1] / times[:, 0], axis=0), np.median(times[:, 1], axis=0)
  return {
    **dict(zip(("prefill_ratio", "decode_ratio"), ratios.tolist(), strict=True)),
    **dict(zip(("prefill_seconds", "decode_seconds"), seconds.tolist(), strict=True)),
    "compile_seconds": engine.compile_seconds,
    "device": jax.devices()[0].device_kind,
  }


def run(config: StudyConfig) -> list[Row]:
  """Runs missing cells, writes the results and returns the table's rows.

  Raises `UserError` for a configuration that cannot be run, a work directory of other settings or an unwritable file,
  and `CheckpointError` for an unreadable checkpoint; files written before stay whole.
  """
  for directory in (config.workdir / "answers", config.workdir / "timings", config.output):
    with command.user_error(f"cannot create {directory}"):
      directory.mkdir(parents=True, exist_ok=True)
  command.use_compilation_cache(config.compilation_cache_dir)
  seed, num_questions = config.generation.seed, config.num_questions
  questions = question_sets.load(config.question_set, num_questions=num_questions, seed=seed, workdir=config.workdir)
  runner = Runner(config, checkpoint.open_checkpoint(config.checkpoint), questions)
  cells = config.grid.cells(runner.shape)
  command.check_settings(config.workdir / "settings.json", runner.settings, "use another --workdir")
  answers, timings = {}, {}
  for number, cell in enumerate(cells, start=1):
    print(f"[{number}/{len(cells)}] {cell.label}{f': {cell.note}' if cell.note else ''}", flush=True)
    if cell.schedule is not None:
      answers[cell.label], timings[cell.label] = runner.answer(cell), runner.time(cell)
  comparison = Comparison(questions, cells, answers, timings, runner.prompt_sizes())
  shown = report.collect(report.choose(questions, config.num_examples), comparison, runner.processor)
  rows, directory = comparison.rows(seed=seed), config.output
  tabular.write_csv(directory / "table.csv", rows)
  columns = tables.readable_columns(rows)
  for name, text in (("table", tables.markdown(rows, columns)), ("types", tables.types_markdown(rows))):
    (directory / f"{name}.md").write_text(text, encoding="utf-8")
  plots.plot_pareto(directory / "pareto.png", rows)
  plots.plot_types(directory / "types.png", rows)
  plots.draw_strips(directory / "strips.png", shown[: config.num_strips], report.cells_to_show(cells))
  title, num_layers = f"Pruning methods on {config.question_set}, {len(questions)} questions", runner.shape.num_layers
  readable = tables.readable_rows(rows)
  report.write_report(directory / "report.html", columns, readable, shown, title=title, num_layers=num_layers)
  printed = [report.Column("label", "", "text"), *(column for column in columns if column.name in tables.PRINTED)]
  print(tables.markdown([row for row in rows if not row.get("note")], printed))
  return rows
