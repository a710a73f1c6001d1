"""The library's `generate`: pictures and questions in, answers out."""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image

from himap_jax import arguments
from himap_jax.checkpoint import LoadedModel, OpenCheckpoint
from himap_jax.engine.batching import DEFAULT_BUCKETS, Batcher, image_buckets
from himap_jax.engine.capacity import BatchSizes
from himap_jax.engine.engine import Batch, GenerationConfig
from himap_jax.engine.pool import Answered, Request
from himap_jax.errors import NOT_FINITE, UserError, check_is, check_whole
from himap_jax.families.family import Processor, Question
from himap_jax.inputs import ImageSize
from himap_jax.pruning.schedule import Schedule
from himap_jax.rgb import to_rgb


@dataclasses.dataclass(frozen=True)
class InputConfig:
  """Preparation of prompts.

  Attributes:
    prompt_template: `chat` (the checkpoint's own), a template of the model (`vicuna_v1` of LLaVA; `vqa`, `caption` and
      `mme` of Qwen-VL-Chat), or a text with `<image>` and `{question}`.
    prompt_buckets: padded text lengths, in tokens.
    batch_size: rows that are decoded together; chosen from the memory of the devices if absent.
    max_image_tokens: most image tokens of a picture, for models that choose them by its size; theirs if absent.
    prefill_batch_size: rows that are prefilled together; chosen if absent.
  """

  prompt_template: str = "chat"
  prompt_buckets: tuple[int, ...] = DEFAULT_BUCKETS
  batch_size: int | None = None
  max_image_tokens: int | None = None
  prefill_batch_size: int | None = None

  def __post_init__(self) -> None:
    check_is("prompt_template", self.prompt_template, str, "a text")
    check_is("prompt_buckets", self.prompt_buckets, (tuple, list), "a list of whole numbers")
    for length in self.prompt_buckets:
      check_whole("a length of prompt_buckets", length)
    for name in ("batch_size", "max_image_tokens", "prefill_batch_size"):
      if getattr(self, name) is not None:
        check_whole(name, getattr(self, name))

  def batch_sizes(self, num_rows: int | None = None) -> BatchSizes:
    """Batch sizes for `num_rows` rows."""
    return BatchSizes(self.batch_size, self.prefill_batch_size, num_rows)


@dataclasses.dataclass(frozen=True)
class Answer:
  """An answer.

  Attributes:
    text: without special tokens; empty if there is an error.
    token_ids: the generated tokens, including the end token.
    kept: for each stage the indices of the kept image tokens, ascending.
    first_logits: `[V]` float32 logits of the first generated token.
    error: why there is no answer, if there is none.
  """

  text: str
  token_ids: list[int]
  kept: list[list[int]]
  first_logits: Float[np.ndarray, "V"]
  error: str | None = None


def make_batcher(
  opened: OpenCheckpoint,
  processor: Processor,
  sizes: Mapping[ImageSize, int],
  prompt_buckets: Sequence[int],
  max_new_tokens: int,
  schedule: Schedule,
) -> Batcher:
  """The batcher of prompts whose pictures have these sizes; `sizes` counts them.

  Buckets do not depend on sizes that the context does not hold.

  Raises:
    UserError: the context is too small for all, or the schedule keeps more image tokens than any prompt has.
  """
  text = opened.config.text
  counts = sizes or {processor.image_size([(1, 1)]): 1}  # if no picture can be read
  held = {size: n for size, n in counts.items() if size.num_tokens + max_new_tokens < text.max_position_embeddings}
  chosen = image_buckets(held or counts, exact=not schedule.is_ranking)
  lengths = {"buckets": prompt_buckets, "max_new_tokens": max_new_tokens}
  batcher = Batcher(text.max_position_embeddings, processor.blank, chosen, **lengths)
  if sizes and batcher.most_image_tokens:
    schedule.at(text.num_hidden_layers, batcher.most_image_tokens)
  return batcher


def _pictures(own: Image.Image | Sequence[Image.Image], name: str) -> list[Image.Image]:
  try:
    return [to_rgb(image) for image in ([own] if isinstance(own, Image.Image) else own)]
  except UserError as error:
    raise UserError(f"{name}: {error}") from error


def generate(
  loaded: LoadedModel,
  images: Sequence[Image.Image | Sequence[Image.Image]],
  questions: Sequence[Question],
  *,
  schedule: Schedule = Schedule(),
  generation: GenerationConfig = GenerationConfig(),
  inputs: InputConfig = InputConfig(),
) -> list[Answer]:
  """Answers questions about images, without pruning by default.

  Args:
    images: for each question its image, or its images in the order of `<image>` in the prompt; use `[]` for no image.
      They may have any mode, and are converted as the pictures of a run are: see `rgb.to_rgb`.
    questions: a text, or the messages of a conversation.

  Raises:
    UserError: unusable arguments, settings or prompts.
  """
  check_is("loaded", loaded, LoadedModel, "what himap_jax.load returns")
  check_is("generation", generation, GenerationConfig, "a GenerationConfig")
  check_is("inputs", inputs, InputConfig, "an InputConfig")
  arguments.check_questions(images, questions)
  arguments.check_schedule(schedule)
  processor = loaded.prompts(inputs.prompt_template, inputs.max_image_tokens)
  rows = [_pictures(own, f"images[{number}]") for number, own in enumerate(images)]
  counts = collections.Counter(processor.image_size([image.size for image in own]) for own in rows)
  batcher = make_batcher(loaded, processor, counts, inputs.prompt_buckets, generation.max_new_tokens, schedule)
  engine = loaded.engine(schedule, generation, inputs.batch_sizes(len(rows)))
  examples = [processor.prepare(own, question) for own, question in zip(rows, questions, strict=True)]
  bucket_of = [batcher.bucket(example) for example in examples]

  def batches() -> Iterator[Batch]:
    for bucket in sorted(set(bucket_of), reverse=True):  # so that the slots hold all that follow
      indices = [index for index, own in enumerate(bucket_of) if own == bucket]
      num_rows = engine.prefill_rows(batcher.pack([], bucket=bucket, batch_size=1))
      for group in (indices[first : first + num_rows] for first in range(0, len(indices), num_rows)):
        packed = batcher.pack([examples[index] for index in group], bucket=bucket, batch_size=num_rows)
        yield Batch(packed, [Request(index, tag=index) for index in group])

  answered = {row.request.tag: row for turn in engine.answer(batches()) for row in turn}
  return [_answer(processor, answered[index]) for index in range(len(examples))]


def _answer(processor: Processor, row: Answered) -> Answer:
  if not row.is_finite:
    return Answer("", [], row.kept, row.logits, NOT_FINITE)
  return Answer(processor.decode(row.tokens), row.tokens, row.kept, row.logits)
