"""Answers and losses for the requests of an evaluation harness, in batches."""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import PIL.Image
from absl import logging

from himap_jax import checkpoint, generation
from himap_jax.checkpoint import LoadedModel
from himap_jax.engine import pool
from himap_jax.engine.accounting import method_inputs
from himap_jax.engine.batching import DEFAULT_BUCKETS, Bucket, in_batches
from himap_jax.engine.capacity import BatchSizes
from himap_jax.engine.engine import Batch, Engine, GenerationConfig
from himap_jax.errors import NOT_FINITE, UserError
from himap_jax.families.examples import check_not_empty
from himap_jax.families.family import Processor
from himap_jax.harness.settings import Settings
from himap_jax.inputs import Example, Inputs
from himap_jax.pruning.schedule import Schedule
from himap_jax.rgb import to_rgb
from himap_jax.run.progress import Progress
from himap_jax.run.user_errors import user_error
from himap_jax.run.writer import COUNTS
from himap_jax.stops import cut_at_stop, stop_condition

ROOM = 32  # tokens that a continuation to score may have


@dataclasses.dataclass(frozen=True)
class Request:
  """One prompt.

  Attributes:
    place: among the requests.
    pictures: loads its pictures.
  """

  place: int
  text: str
  pictures: Callable[[], list[PIL.Image.Image]]


@dataclasses.dataclass(frozen=True)
class Question(Request):
  """A prompt to answer; the answer is cut at the first of the `stops`."""

  generation: GenerationConfig
  stops: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Continuation(Request):
  """A text that may follow a prompt.

  Attributes:
    prompt: equal for continuations of the same prompt.
  """

  target: str
  prompt: Any


R = TypeVar("R", bound=Request)


class Answer(NamedTuple):
  """An answer, with the counts and the seconds of `--emit=counts,timing`."""

  text: str
  num_tokens: int
  counts: Mapping[str, Any]
  timing: Mapping[str, float]


class Loss(NamedTuple):
  """The mean negative log-likelihood of a continuation's tokens, and whether greedy decoding gives them."""

  value: float
  is_greedy: bool


@dataclasses.dataclass(frozen=True)
class Responder:
  """Answers requests with one model and schedule; those that cannot be are left out, with a warning."""

  loaded: LoadedModel
  processor: Processor
  schedule: Schedule
  settings: Settings

  @classmethod
  def load(cls, settings: Settings) -> "Responder":
    """Loads the checkpoint; JAX chooses the devices. Raises `UserError`."""
    opened = checkpoint.open_checkpoint(settings.checkpoint).with_aspect_ratio(settings.image_aspect_ratio)
    schedule = settings.pruning.schedule(**method_inputs(opened.config))
    processor = opened.prompts(settings.prompt_template, settings.max_image_tokens)
    dtype = checkpoint.DTYPES[settings.dtype]
    loaded = opened.restore(dtype=dtype, mesh=opened.make_mesh(dtype, settings.batch_size))
    return cls(loaded, processor, schedule, settings)

  def answers(self, questions: Sequence[Question]) -> Iterator[tuple[Question, Answer]]:
    """Yields answers as they are ready, in batches of questions with one generation config."""
    by_config = collections.defaultdict(list)
    for question in questions:
      by_config[question.generation].append(question)
    with Progress(len(questions), "request", "answering") as progress:
      for config, group in by_config.items():
        engine = self._engine(config)
        batches = (
          Batch(inputs, [self._request(*own) for own in batch])
          for inputs, batch in self._batches(group, engine, config.max_new_tokens, progress)
        )
        for row in itertools.chain.from_iterable(engine.answer(batches)):
          progress.update()
          question, example = row.request.tag
          if not row.is_finite:
            logging.warning("request %d is not answered: %s", question.place, NOT_FINITE)
            continue
          counts = (example.size.num_tiles, example.num_image_tokens, example.num_text_tokens, list(map(len, row.kept)))
          text = cut_at_stop(self.processor.decode(row.tokens), question.stops)
          timing = {name: getattr(row, name) for name in ("prefill_seconds", "decode_seconds")}
          yield question, Answer(text, len(row.tokens), dict(zip(COUNTS, counts, strict=True)), timing)

  def _request(self, question: Question, example: Example) -> pool.Request:
    is_complete = stop_condition(self.processor, question.stops)
    return pool.Request(question.place, is_complete=is_complete, tag=(question, example))

  def losses(self, continuations: Sequence[Continuation]) -> Iterator[tuple[Continuation, Loss]]:
    """Yields losses as they are ready; a prompt is prefilled once for all its continuations.

    The prompt seeds methods that choose at random, so that continuations scored later are read over the same tokens.
    """
    by_prompt = collections.defaultdict(list)
    for continuation in continuations:
      by_prompt[continuation.prompt].append(continuation)
    engine = self._engine(GenerationConfig(seed=self.settings.seed))
    with Progress(len(by_prompt), "prompt", "scoring") as progress:
      for inputs, batch in self._batches([own[0] for own in by_prompt.values()], engine, ROOM, progress):
        groups, wanted = [], []
        for first, example in batch:
          given = [(own, self._tokens(own.text, own.target, example.num_images)) for own in by_prompt[first.prompt]]
          for own in (own for own, tokens in given if not tokens):
            logging.warning("request %d is not answered: its continuation %r has no tokens", own.place, own.target)
          groups.append([own for own, tokens in given if tokens])
          wanted.append([tokens for _, tokens in given if tokens])
        scores = engine.score(inputs, [repr(first.prompt) for first, _ in batch], wanted)
        progress.update(len(batch))
        for group, given, own in zip(groups, wanted, scores, strict=True):
          for continuation, tokens, score in zip(group, given, own, strict=True):
            if not np.isfinite(score.log_probability):
              logging.warning("request %d is not answered: %s", continuation.place, NOT_FINITE)
              continue
            yield continuation, Loss(-score.log_probability / len(tokens), score.is_greedy)

  def _tokens(self, text: str, target: str, num_images: int) -> list[int]:
    """The tokens that a continuation adds to the prompt, or its own if the two grow together."""
    tokenize = functools.partial(self.loaded.processor.tokenizer, add_special_tokens=False)
    prompt = self.processor.prompt(text, num_images)
    before, both = tokenize(prompt)["input_ids"], tokenize(prompt + target)["input_ids"]
    added = both[len(before) :] if both[: len(before)] == before else []
    return added or tokenize(target)["input_ids"]

  def _engine(self, config: GenerationConfig) -> Engine:
    return self.loaded.engine(self.schedule, config, BatchSizes(self.settings.batch_size))

  def _batches(
    self, requests: Sequence[R], engine: Engine, max_new_tokens: int, progress: Progress
  ) -> Iterator[tuple[Inputs, list[tuple[R, Example]]]]:
    """Yields batches of requests of one bucket each; sizes of pictures are read first, then pictures are prepared."""
    sizes = collections.Counter()
    for request in requests:
      try:
        sizes[self.processor.image_size([picture.size for picture in pictures_of(request)])] += 1
      except UserError:
        continue  # reported below
    buckets = self.settings.prompt_buckets or DEFAULT_BUCKETS
    batcher = generation.make_batcher(self.loaded, self.processor, sizes, buckets, max_new_tokens, self.schedule)

    @functools.cache
    def num_rows(bucket: Bucket) -> int | str:
      """Rows of a batch, or why the memory holds none."""
      try:
        return engine.prefill_rows(batcher.pack([], bucket=bucket, batch_size=1))
      except UserError as error:
        return str(error)

    def place(example: Example) -> Bucket:
      bucket = batcher.bucket(example)
      if isinstance(found := num_rows(bucket), str):
        raise UserError(found)
      return bucket

    for bucket, batch in in_batches(self._prepared(requests, place, progress), num_rows):
      yield batcher.pack([example for _, example in batch], bucket=bucket, batch_size=num_rows(bucket)), batch

  def _prepared(
    self, requests: Sequence[R], place: Callable[[Example], Bucket], progress: Progress
  ) -> Iterator[tuple[Bucket, tuple[R, Example]]]:
    """Yields the requests that can be prepared, with their buckets; the others have a warning, and count as done."""
    for request in requests:
      try:
        example = self._example(request)
        prepared = place(example), (request, example)
      except UserError as error:
        logging.warning("request %d is not answered: %s", request.place, error)
        progress.update()
      else:
        yield prepared

  def _example(self, request: Request) -> Example:
    return self.processor.prepare(pictures_of(request), request.text)


def pictures_of(request: Request) -> list[PIL.Image.Image]:
  """The request's pictures in RGB; raises `UserError` for anything else, or one that is damaged or without pixels."""
  with user_error("damaged image"):
    pictures = request.pictures()
  for picture in pictures:
    if not isinstance(picture, PIL.Image.Image):
      raise UserError(f"only pictures are supported, not {type(picture).__name__}")
    check_not_empty(*picture.size)
  return [to_rgb(picture) for picture in pictures]
