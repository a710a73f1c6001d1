"""One question at a time, for the commands that ask and show."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from PIL import Image

from himap_jax.checkpoint import LoadedModel, OpenCheckpoint
from himap_jax.engine.accounting import method_inputs
from himap_jax.engine.batching import Batcher, Bucket
from himap_jax.engine.capacity import BatchSizes
from himap_jax.engine.engine import Batch
from himap_jax.engine.pool import Answered, Request
from himap_jax.errors import NOT_FINITE, UserError
from himap_jax.families.family import Processor, Question
from himap_jax.generation import make_batcher
from himap_jax.inputs import Example
from himap_jax.pruning.config import PruningConfig
from himap_jax.pruning.schedule import Schedule
from himap_jax.run import command
from himap_jax.run.config import AnswerConfig
from himap_jax.run.user_errors import out_of_memory_is_user_error

STEPS = 4  # tokens that appear together
INCOMPLETE = "\ufffd"  # what a tokenizer gives for a character of which tokens are missing


class Asked(NamedTuple):
  """A question that the model can answer, and how it is pruned."""

  example: Example
  schedule: Schedule
  batcher: Batcher
  bucket: Bucket


class Reply(NamedTuple):
  """An answer.

  Attributes:
    text: without special tokens.
    compile_seconds: of the programs that had to be compiled for it; no part of its other times.
  """

  answered: Answered
  text: str
  compile_seconds: float


@dataclasses.dataclass(frozen=True)
class Asker:
  """Asks one checkpoint.

  Attributes:
    processor: of its prompts.
  """

  config: AnswerConfig
  opened: OpenCheckpoint
  processor: Processor

  @classmethod
  def open(cls, config: AnswerConfig) -> "Asker":
    """Reads all but the weights; raises `UserError` or `CheckpointError`."""
    command.use_compilation_cache(config.compilation_cache_dir)
    opened = config.open()
    return cls(config, opened, opened.prompts(config.inputs.prompt_template, config.inputs.max_image_tokens))

  @functools.cached_property
  def loaded(self) -> LoadedModel:
    """The model with its weights, which are read once, for the first answer."""
    return self.config.restore(self.opened, self.config.make_mesh(self.opened))

  def schedule(self, pruning: PruningConfig) -> Schedule:
    """The schedule for this model, which tells ranks; raises `UserError` if the model cannot run it."""
    return dataclasses.replace(pruning.schedule(**method_inputs(self.opened.config)), tells_ranks=True)

  def prepare(self, pictures: Sequence[Image.Image], question: Question, pruning: PruningConfig) -> Asked:
    """Raises `UserError` if the model cannot answer the question, or not with this pruning."""
    schedule = self.schedule(pruning)
    example = self.processor.prepare(pictures, question)
    most, buckets = self.config.generation.max_new_tokens, self.config.inputs.prompt_buckets
    batcher = make_batcher(self.opened, self.processor, collections.Counter([example.size]), buckets, most, schedule)
    return Asked(example, schedule, batcher, batcher.bucket(example))

  def answer(self, asked: Asked, is_complete: Callable[[Sequence[int]], bool] | None = None) -> Reply:
    """Answers; `is_complete` sees the tokens so far, as in `Request`.

    Raises:
      UserError: the devices have too little memory, or logits are not finite.
    """
    engine = self.loaded.engine(asked.schedule, self.config.generation, BatchSizes(1, 1), most_steps=STEPS)
    batcher, bucket = asked.batcher, asked.bucket
    num_rows = engine.prefill_rows(batcher.pack([], bucket=bucket, batch_size=1))
    inputs = batcher.pack([asked.example], bucket=bucket, batch_size=num_rows)
    batch = Batch(inputs, [Request(0, is_complete=is_complete)])
    with out_of_memory_is_user_error(lambda: f"{bucket.num_image_tokens} image tokens"):
      (answered,) = (row for turn in engine.answer([batch]) for row in turn)
    if not answered.is_finite:
      raise UserError(NOT_FINITE)
    return Reply(answered, self.processor.decode(answered.tokens), engine.programs.seconds)
