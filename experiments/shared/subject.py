"""The subject of a study: a model and batches of questions about pictures."""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from absl import logging

from experiments.question_sets import Question
from experiments.shared import kept
from himap_jax.checkpoint import LoadedModel, OpenCheckpoint
from himap_jax.engine.batching import Batcher, Bucket, ImageBucket, in_batches
from himap_jax.engine.capacity import BatchSizes
from himap_jax.engine.engine import Engine, GenerationConfig
from himap_jax.errors import NOT_FINITE, UserError
from himap_jax.families.family import Processor
from himap_jax.generation import InputConfig
from himap_jax.inputs import Example, Inputs
from himap_jax.pruning.schedule import Schedule
from himap_jax.run.pictures import load_image
from himap_jax.run.progress import Progress


class Batch(NamedTuple):
  """Questions that are measured together, and their prompts; the last question's row is repeated to fill the batch."""

  questions: Sequence[Question]
  inputs: Inputs

  @property
  def row_ids(self) -> list[str]:
    ids = [question.id for question in self.questions]
    return ids + ids[-1:] * (len(self.inputs.tokens) - len(ids))


@dataclasses.dataclass(frozen=True)
class Subject:
  """A model and the questions on which it is studied, in the order of their set."""

  opened: OpenCheckpoint
  restore: Callable[[], LoadedModel]  # reads the weights at the first call
  processor: Processor
  batcher: Batcher
  questions: Sequence[Question]
  batch_size: int = 1
  seed: int = 0  # of all random draws

  @classmethod
  def load(
    cls,
    opened: OpenCheckpoint,
    questions: Sequence[Question],
    *,
    dtype: Any = jnp.float32,
    inputs: InputConfig = InputConfig(prompt_buckets=(64, 128, 256), batch_size=1),
    max_new_tokens: int = 0,
    num_rows: int = 1,
    seed: int = 0,
  ) -> "Subject":
    """A subject whose weights are read on first use.

    Prompts leave room for `max_new_tokens` in the context. Batches have multiples of `num_rows` rows, which are sharded
    over as many devices as divide that number.

    Raises:
      UserError: pictures have different numbers of image tokens, or the context does not hold one.
    """
    processor = opened.prompts(inputs.prompt_template)
    if processor.num_image_tokens is None:
      raise UserError("studies need a model that turns every picture into equally many image tokens")
    lengths = {"buckets": inputs.prompt_buckets, "max_new_tokens": max_new_tokens}
    sizes = [ImageBucket(*processor.image_size([(1, 1)]))]  # of a picture of any size
    batcher = Batcher(opened.config.text.max_position_embeddings, processor.blank, sizes, **lengths)

    @functools.cache
    def restore() -> LoadedModel:
      return opened.restore(dtype=dtype, mesh=opened.make_mesh(dtype, num_rows))

    return cls(opened, restore, processor, batcher, questions, inputs.batch_size, seed)

  @property
  def loaded(self) -> LoadedModel:
    return self.restore()

  @property
  def num_layers(self) -> int:
    return self.opened.config.text.num_hidden_layers

  def himap(self, prune_layers: tuple[int, ...] | None, keep: tuple[int | float, ...] | None) -> Schedule:
    """HiMAP's schedule for the model and one picture; arguments and errors as in `pruning.config.build_schedule`."""
    return self.opened.schedule("himap", prune_layers, keep).at(self.num_layers, self.processor.num_image_tokens)

  def engine(self, schedule: Schedule, generation: GenerationConfig) -> Engine:
    return self.loaded.engine(schedule, generation, BatchSizes(self.batch_size, self.batch_size))

  def answers(
    self, schedules: Mapping[str, Schedule], prefix: pathlib.Path, *, max_new_tokens: int
  ) -> dict[str, dict[str, str]]:
    """Greedy answers by schedule name and question id, cached in files whose paths begin with `prefix`."""

    def compute(schedule: Schedule, label: str) -> dict[str, str]:
      engine = self.engine(schedule, GenerationConfig(max_new_tokens, seed=self.seed))
      found = {}
      for batch in self.batches(label):
        generation = engine(batch.inputs, batch.row_ids)
        if not generation.is_finite:
          raise UserError(NOT_FINITE)
        found |= zip(batch.row_ids, map(self.processor.decode, generation.tokens), strict=True)
      return found

    labels = {name: f"{prefix.name}-{re.sub('[^a-z0-9]', '_', name)}" for name in schedules}
    return {
      name: kept.json_of(prefix.with_name(f"{label}.json"), compute, schedules[name], label)
      for name, label in labels.items()
    }

  def measure(
    self, prefix: pathlib.Path, compute: Callable[[Batch], Mapping[str, np.ndarray]], *, axis: int
  ) -> tuple[list[Question], dict[str, np.ndarray]]:
    """The questions in the order of their batches, and arrays with an axis of questions.

    `compute` returns a batch's arrays with rows on `axis`; batches are cached in files whose paths begin with `prefix`.
    """

    def make(batch: Batch) -> dict[str, np.ndarray]:
      rows = range(len(batch.questions))
      return {name: np.take(values, rows, axis) for name, values in compute(batch).items()}

    questions, parts = [], []
    for number, batch in enumerate(self.batches(prefix.name)):
      parts.append(kept.arrays_of(prefix.with_name(f"{prefix.name}-{number:05d}.npz"), make, batch))
      questions += batch.questions
    return questions, {name: np.concatenate([part[name] for part in parts], axis) for name in parts[0]}

  def example(self, question: Question) -> Example:
    """Prepares a question; `UserError` if it cannot be prepared."""
    return self.processor.prepare([load_image(question.image)], question.question)

  def examples(self, label: str) -> Iterator[tuple[Question, Example, Bucket]]:
    """Yields every question that can be prepared, with its prompt and bucket; `UserError` if there is none."""
    num_left_out = 0
    with Progress(len(self.questions), "question", label) as progress:
      for question in self.questions:
        try:
          example = self.example(question)
          prepared = question, example, self.batcher.bucket(example)
        except UserError as error:
          logging.warning("%s: %s is left out: %s", label, question.id, error)
          num_left_out += 1
        else:
          yield prepared
        progress.update()
    if num_left_out == len(self.questions):
      raise UserError("none of the questions can be prepared; the warnings say why")

  def batches(self, label: str) -> Iterator[Batch]:
    """Yields batches of one bucket each from `examples`; they depend only on the questions and the batch size."""
    prepared = ((bucket, (question, example)) for question, example, bucket in self.examples(label))
    for bucket, rows in in_batches(prepared, lambda bucket: self.batch_size):
      questions, examples = zip(*rows, strict=True)
      yield Batch(questions, self.batcher.pack(examples, bucket=bucket, batch_size=self.batch_size))
