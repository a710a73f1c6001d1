"""What the analyses look at: a model, and batches of questions about pictures. The flags are those of every analysis."""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import flags, logging

from checkpoints_convert.marker import read_marker
from experiments import question_sets
from experiments.question_sets import Question
from himap_jax import attention, checkpoint, command, sharding
from himap_jax.checkpoint import LoadedModel
from himap_jax.images import load_image
from himap_jax.llava import Inputs, Llava
from himap_jax.processing import Example, Processor

_CHECKPOINT = flags.DEFINE_string("checkpoint", "demo", "As in himap_jax.run.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", sorted(command.DTYPES), "Of parameters and activations.")
_QUESTION_SET = flags.DEFINE_string(
  "question_set", "scenes", f"{', '.join(question_sets.SETS)}, or a JSONL file, as in experiments.compare."
)
_NUM_QUESTIONS = flags.DEFINE_integer("num_questions", 50, "Drawn from it, each type in proportion.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the draw, and of all chance after it.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 1, "Questions per batch.", lower_bound=1)
_PROMPT_BUCKETS = flags.DEFINE_list("prompt_buckets", ["64", "128", "256"], "As in himap_jax.run.")
_PROMPT_TEMPLATE = flags.DEFINE_string("prompt_template", "chat", "As in himap_jax.run.")
_COMPILATION_CACHE_DIR = flags.DEFINE_string("compilation_cache_dir", None, "As in himap_jax.run.")


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

  def batches(self) -> Iterator[Batch]:
    """Batches of one bucket each; a question that cannot be prepared is left out with a warning."""
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


def from_flags(workdir: pathlib.Path) -> Subject:
  """What the flags name.

  Args:
    workdir: where a question set that has to be made is written.

  Raises:
    ValueError: there is no such checkpoint or question set, or a flag is malformed.
  """
  command.use_compilation_cache(command.compilation_cache_dir(_COMPILATION_CACHE_DIR.value))
  questions = question_sets.load(
    _QUESTION_SET.value, num_questions=_NUM_QUESTIONS.value, seed=_SEED.value, workdir=workdir
  )
  loaded = checkpoint.load(_CHECKPOINT.value, dtype=command.DTYPES[_DTYPE.value])
  processor = Processor(
    loaded.processor, loaded.config, template=_PROMPT_TEMPLATE.value, buckets=command.numbers(_PROMPT_BUCKETS, int)
  )
  flags_of_results = (
    _CHECKPOINT, _DTYPE, _QUESTION_SET, _NUM_QUESTIONS, _SEED, _BATCH_SIZE, _PROMPT_BUCKETS, _PROMPT_TEMPLATE
  )  # fmt: skip
  settings = {flag.name: flag.value for flag in flags_of_results}
  return Subject(
    loaded=loaded,
    model=Llava(loaded.config, loaded.dtype, attention.for_mesh(sharding.make_mesh())),
    processor=processor,
    questions=questions,
    batch_size=_BATCH_SIZE.value,
    seed=_SEED.value,
    settings=settings | {"fingerprint": read_marker(loaded.directory)["fingerprint"]},
  )


def save(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
  """Writes arrays to a file that appears whole."""
  unfinished = path.with_suffix(".tmp.npz")
  np.savez(unfinished, **arrays)
  unfinished.replace(path)


def load(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The arrays of a file."""
  with np.load(path) as file:
    return dict(file)
