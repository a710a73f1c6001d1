"""What the analyses look at: a model, and batches of questions about pictures."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from absl import logging
from tqdm import tqdm

from checkpoints_convert.marker import read_marker
from experiments.question_sets import Question
from himap_jax import attention, checkpoint, sharding
from himap_jax.checkpoint import LoadedModel
from himap_jax.images import load_image
from himap_jax.llava import Inputs, Llava
from himap_jax.processing import Example, Processor


@dataclasses.dataclass(frozen=True)
class Batch:
  """Questions that are looked at together.

  Attributes:
    questions: the real ones; the rows after them repeat the last.
    inputs: their prompts.
    number: of the batch, which depends on the questions alone.
  """

  questions: list[Question]
  inputs: Inputs
  number: int

  @property
  def row_ids(self) -> list[str]:
    """The ids of all rows."""
    ids = [question.id for question in self.questions]
    return ids + ids[-1:] * (len(self.inputs.tokens) - len(ids))


@dataclasses.dataclass(frozen=True)
class Subject:
  """A model and the questions.

  Attributes:
    loaded: the checkpoint.
    model: its computation.
    processor: prepares prompts.
    questions: in the order of their set.
    batch_size: rows of a batch.
    seed: of all chance.
    settings: what results depend on.
  """

  loaded: LoadedModel
  model: Llava
  processor: Processor
  questions: list[Question]
  batch_size: int
  seed: int
  settings: dict[str, Any]

  @property
  def num_layers(self) -> int:
    """Layers of the decoder."""
    return self.loaded.config.text.num_hidden_layers

  def example(self, question: Question) -> Example:
    """A prepared question.

    Raises:
      ValueError: it cannot be prepared.
    """
    return self.processor.prepare(load_image(question.image), question.question)

  def batches(self, label: str) -> Iterator[Batch]:
    """Batches of one bucket each, with a bar of this label; a question that cannot be prepared is left out with a warning.

    Raises:
      ValueError: none can be prepared, once all were tried.
    """
    total = -(-len(self.questions) // self.batch_size)  # more where buckets end before a batch does
    return tqdm(self._batches(), desc=label, total=total, unit="batch", disable=None)

  def _batches(self) -> Iterator[Batch]:
    waiting: dict[int, list[tuple[Question, Example]]] = {}
    number = 0

    def batch(bucket: int) -> Batch:
      nonlocal number
      questions, examples = zip(*waiting.pop(bucket), strict=True)
      number += 1
      inputs = self.processor.batch(examples, bucket=bucket, batch_size=self.batch_size)
      return Batch(list(questions), inputs, number - 1)

    for question in self.questions:
      try:
        example = self.example(question)
      except ValueError as error:
        logging.warning("%s is left out: %s", question.id, error)
        continue
      bucket = self.processor.bucket(example)
      waiting.setdefault(bucket, []).append((question, example))
      if len(waiting[bucket]) == self.batch_size:
        yield batch(bucket)
    for bucket in list(waiting):
      yield batch(bucket)
    if not number:
      raise ValueError("none of the questions can be asked; the warnings say why")


def make(
  name: str,
  questions: list[Question],
  *,
  dtype: Any = jnp.float32,
  template: str = "chat",
  buckets: tuple[int, ...] = (64, 128, 256),
  batch_size: int = 1,
  seed: int = 0,
) -> Subject:
  """Loads a checkpoint to look at with some questions.

  Args:
    name: as `checkpoint.resolve` takes it.
    questions: what to ask.
    dtype: of parameters and activations.
    template: see `Processor`.
    buckets: padded text lengths.
    batch_size: questions per batch.
    seed: of all chance.

  Raises:
    ValueError: there is no such checkpoint, or the settings cannot be used.
  """
  loaded = checkpoint.load(name, dtype=dtype)
  return Subject(
    loaded=loaded,
    model=Llava(loaded.config, loaded.dtype, attention.for_mesh(sharding.make_mesh())),
    processor=Processor(loaded.processor, loaded.config, template=template, buckets=buckets),
    questions=questions,
    batch_size=batch_size,
    seed=seed,
    settings={
      "checkpoint": name,
      "fingerprint": read_marker(loaded.directory)["fingerprint"],
      "dtype": str(loaded.dtype),
      "prompt_template": template,
      "prompt_buckets": buckets,
      "batch_size": batch_size,
      "seed": seed,
    },
  )
