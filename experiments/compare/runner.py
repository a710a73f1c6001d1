"""Runs cells: answers and times go to files, and what the files hold is not run again."""

import contextlib
import functools
import itertools
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from jax.sharding import Mesh

from experiments import kept
from experiments.compare import timing
from experiments.compare.grid import Cell
from experiments.question_sets import Question
from himap_jax import inference
from himap_jax.checkpoint import LoadedModel, OpenCheckpoint
from himap_jax.generation import Generator
from himap_jax.images import load_image
from himap_jax.llava import Inputs
from himap_jax.output import OutputWriter, answered_ids
from himap_jax.processing import Example, Processor
from himap_jax.prompts import Prompt
from himap_jax.schedule import Schedule


class Runner:
  """Runs the cells of one study; the weights are read when first needed."""

  def __init__(
    self,
    opened: OpenCheckpoint,
    processor: Processor,
    questions: Sequence[Question],
    workdir: pathlib.Path,
    *,
    dtype: Any,
    mesh: Mesh,
    seed: int,
    max_new_tokens: int,
    batch_size: int,
    timing_batch_size: int,
    timing_new_tokens: int,
    timing_repeats: int,
  ):
    self._opened = opened
    self._processor = processor
    self._questions = questions
    self._dtype = dtype
    self._mesh = mesh
    self._seed = seed
    self._max_new_tokens = max_new_tokens
    self._batch_size = batch_size
    self._timing_batch_size = timing_batch_size
    self._timing_new_tokens = timing_new_tokens
    self._timing_repeats = timing_repeats
    self._answers = workdir / "answers"
    self._timings = workdir / "timings"
    for directory in (self._answers, self._timings):
      directory.mkdir(parents=True, exist_ok=True)

  def answer(self, cell: Cell) -> dict[str, dict[str, Any]]:
    """Answers what is not answered yet; returns every output row by its id."""
    path = self._answers / f"{cell.file_name}.jsonl"
    if not answered_ids(path) >= {question.id for question in self._questions}:
      prompts = [Prompt(q.id, str(q.image.absolute()), q.question) for q in self._questions]
      generator = Generator(self._loaded, cell.schedule, max_new_tokens=self._max_new_tokens, seed=self._seed)
      with OutputWriter(path, resume=True) as writer:
        inference.answer_all(
          prompts,
          self._processor,
          generator,
          writer,
          answered=writer.answered,
          image_dir=pathlib.Path(),
          rows_at_once=self._batch_size,
          multiple=self._batch_size,
          emit=frozenset({"tokens", "kept"}),
          pictures=None,
        )
    return {row["id"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}

  def time(self, cell: Cell) -> dict[str, Any]:
    """Times a cell once: what `timing.measure` gives, or nothing without repeats."""
    path = self._timings / f"{cell.file_name}.json"
    if not self._timing_repeats:
      return {}

    def measure() -> dict[str, Any]:
      generator = self._timed(cell.schedule) if cell.schedule != Schedule() else self._reference
      return timing.measure(self._reference, generator, self._timing_inputs, repeats=self._timing_repeats)

    return kept.json_of(path, measure)

  @functools.cached_property
  def _loaded(self) -> LoadedModel:
    return self._opened.restore(dtype=self._dtype, mesh=self._mesh)

  @functools.cached_property
  def _reference(self) -> Generator:
    return self._timed(Schedule())

  @functools.cached_property
  def _timing_inputs(self) -> Inputs:
    examples = list(itertools.islice(self._examples(), self._timing_batch_size))
    if not examples:
      raise ValueError("no question can be prepared for timing")
    bucket = max(self._processor.bucket(example) for example in examples)
    return self._processor.batch(examples, bucket=bucket, batch_size=self._timing_batch_size)

  def _examples(self) -> Iterator[Example]:
    """The questions that can be prepared; the others are error rows among the answers."""
    for question in self._questions:
      with contextlib.suppress(ValueError):
        yield self._processor.prepare(load_image(question.image), question.question)

  def _timed(self, schedule: Schedule) -> Generator:
    return Generator(self._loaded, schedule, max_new_tokens=self._timing_new_tokens, seed=self._seed, ignore_eos=True)
