"""A comparison from its settings to its tables, plots and report."""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image

from checkpoints_convert.marker import read_marker
from experiments import question_sets, tabular
from experiments.compare import examples, plots, report, strips, tables
from experiments.compare.grid import Cell, make_cells
from experiments.compare.runner import Runner
from experiments.question_sets import Question
from himap_jax import checkpoint, command, sharding
from himap_jax.processing import Processor


@dataclasses.dataclass(frozen=True)
class StudyConfig:
  """A study, as the flags give it; the names and meanings are the flags'."""

  checkpoint: str
  dtype: str
  question_set: str
  num_questions: int | None
  seed: int
  methods: tuple[str, ...]
  budgets: tuple[float, ...]
  settings: tuple[str, ...]
  shortv_ranking: tuple[int, ...] | None
  max_new_tokens: int
  batch_size: int
  prompt_buckets: tuple[int, ...]
  prompt_template: str
  timing_batch_size: int
  timing_new_tokens: int
  timing_repeats: int
  num_examples: int
  num_strips: int
  workdir: pathlib.Path
  output: pathlib.Path
  compilation_cache_dir: str


def settings_of(config: StudyConfig, directory: pathlib.Path, questions: Sequence[Question]) -> dict[str, Any]:
  """What the answers and times of a work directory depend on, beside the cells."""
  names = ("checkpoint", "dtype", "question_set", "num_questions", "seed", "max_new_tokens", "prompt_template")
  names += ("batch_size", "prompt_buckets", "timing_batch_size", "timing_new_tokens", "timing_repeats")
  return {name: getattr(config, name) for name in names} | {
    "fingerprint": read_marker(directory)["fingerprint"],
    "questions": question_sets.digest(questions),
  }


def mean_text_tokens(processor: Processor, questions: Sequence[Question]) -> int:
  """The mean number of text tokens of the prompts that the model can take."""
  blank, lengths = Image.new("RGB", (64, 64)), {}
  for text in {question.question for question in questions}:
    with contextlib.suppress(ValueError):
      lengths[text] = processor.prepare(blank, text).num_text_tokens
  return round(float(np.mean([lengths[q.question] for q in questions if q.question in lengths])))


def run(config: StudyConfig) -> list[tables.Row]:
  """Runs what has not been run yet, writes the results and returns the table's rows.

  Raises:
    ValueError: the configuration cannot be run, or the work directory belongs to another.
    OSError: a file cannot be written; what was written before is whole.
  """
  for directory in (config.workdir, config.output):
    directory.mkdir(parents=True, exist_ok=True)
  command.use_compilation_cache(config.compilation_cache_dir)
  questions = question_sets.load(
    config.question_set, num_questions=config.num_questions, seed=config.seed, workdir=config.workdir
  )
  opened = checkpoint.open_checkpoint(config.checkpoint)
  processor = Processor(
    opened.processor,
    opened.config,
    template=config.prompt_template,
    buckets=config.prompt_buckets,
    max_new_tokens=max(config.max_new_tokens, config.timing_new_tokens),
  )
  cells = make_cells(
    config.methods,
    config.budgets,
    config.settings,
    num_layers=opened.config.text.num_hidden_layers,
    num_image_tokens=processor.num_image_tokens,
    has_class_token=opened.config.vision.has_class_token,
    ranking=config.shortv_ranking,
  )
  settings = settings_of(config, opened.directory, questions)
  command.hold_to_settings(config.workdir / "settings.json", settings, "use another --workdir")
  dtype = command.DTYPES[config.dtype]
  num_rows = math.gcd(config.batch_size, config.timing_batch_size)
  mesh = sharding.make_mesh(**sharding.choose_mesh(opened.config, opened.num_bytes(dtype), num_rows))
  runner = Runner(
    opened,
    processor,
    questions,
    config.workdir,
    dtype=dtype,
    mesh=mesh,
    seed=config.seed,
    max_new_tokens=config.max_new_tokens,
    batch_size=config.batch_size,
    timing_batch_size=config.timing_batch_size,
    timing_new_tokens=config.timing_new_tokens,
    timing_repeats=config.timing_repeats,
  )
  answers, timings = {}, {}
  for number, cell in enumerate(cells, start=1):
    print(f"[{number}/{len(cells)}] {cell.label}{f': {cell.note}' if cell.note else ''}", flush=True)
    if cell.schedule is not None:
      answers[cell.label] = runner.answer(cell)
      timings[cell.label] = runner.time(cell)
  rows = tables.make_rows(
    cells,
    answers,
    timings,
    questions,
    opened.config,
    num_image_tokens=processor.num_image_tokens,
    num_text_tokens=mean_text_tokens(processor, questions),
    bytes_per_value=jnp.dtype(command.DTYPES[config.dtype]).itemsize,
    seed=config.seed,
  )
  shown = examples.collect(examples.choose(questions, config.num_examples), cells, answers, processor)
  write_results(config, rows, shown, cells, len(questions), opened.config.text.num_hidden_layers)
  tables.print_table(rows)
  return rows


def write_results(
  config: StudyConfig,
  rows: Sequence[tables.Row],
  shown: Sequence[report.Example],
  cells: Sequence[Cell],
  num_questions: int,
  num_layers: int,
) -> None:
  """Writes tables, plots and the report."""
  tabular.write_csv(config.output / "table.csv", rows)
  tables.write_markdown(config.output / "table.md", rows)
  tables.write_types(config.output / "types.md", rows)
  plots.plot_pareto(config.output / "pareto.png", rows)
  plots.plot_types(config.output / "types.png", rows)
  strips.draw(config.output / "strips.png", shown[: config.num_strips], strips.cells_to_show(cells))
  report.write_report(
    config.output / "report.html",
    tables.readable_columns(rows),
    tables.readable_rows(rows),
    shown,
    title=f"Pruning methods on {config.question_set}, {num_questions} questions",
    num_layers=num_layers,
  )
