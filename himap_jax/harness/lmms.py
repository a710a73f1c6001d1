"""The model that lmms-eval runs, without a fork:

    python -m lmms_eval --model himap_jax --tasks textvqa_val --batch_size 8 \\
      --model_args checkpoint=…,method=himap,prune_layers=2:8,keep=288:72

It needs lmms-eval, and hence torch, which computes nothing here.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import PIL.Image
from absl import logging
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms

from himap_jax import checkpoint, generation
from himap_jax.engine import sharding
from himap_jax.engine.batching import DEFAULT_BUCKETS, Batcher, Bucket, in_batches
from himap_jax.engine.engine import Engine, GenerationConfig
from himap_jax.engine.sampling import Sampling
from himap_jax.errors import UserError
from himap_jax.harness.settings import Settings
from himap_jax.inputs import Example, Inputs
from himap_jax.run import command
from himap_jax.run.progress import Progress

ROOM = 32  # tokens that a continuation to score may have


@dataclasses.dataclass(frozen=True)
class Request:
  """One prompt: its place among the results, its text, and a function that loads its pictures."""

  place: int
  text: str
  pictures: Callable[[], list[PIL.Image.Image]]


class HimapJax(lmms):
  """A checkpoint with a pruning method, as an lmms-eval model of the `simple` kind."""

  is_simple = True

  def __init__(self, batch_size: int | str = 1, device: str | None = None, max_batch_size: Any = None, **given: Any):
    """Loads the checkpoint; `given` are `Settings`, and JAX chooses the devices. Raises `UserError`."""
    super().__init__()
    del device, max_batch_size
    self.settings = Settings.of(given | {"batch_size": batch_size})
    opened = checkpoint.open_checkpoint(self.settings.checkpoint)
    opened = opened.with_aspect_ratio(self.settings.image_aspect_ratio)
    self._schedule = opened.schedule(self.settings.method, self.settings.prune_layers, self.settings.keep)
    self._processor = opened.prompts(self.settings.prompt_template, self.settings.max_image_tokens)
    dtype = command.DTYPES[self.settings.dtype]
    axes = sharding.choose_mesh(opened.config, opened.num_bytes(dtype), self.settings.batch_size)
    self._loaded = opened.restore(dtype=dtype, mesh=sharding.make_mesh(**axes))
    self._batch_size = sharding.padded_batch_size(self.settings.batch_size, sharding.mesh_of(self._loaded.model.params))

  def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
    """Answers in the order of the requests; one that cannot be prepared is empty, with a warning."""
    results = [GenerationResult("", TokenCounts(output_tokens=0)) for _ in requests]
    by_config = collections.defaultdict(list)
    stops = {}
    for place, request in enumerate(requests):
      context, settings, doc_to_visual, doc_id, task, split = request.args
      config, stops[place] = self._generation(settings)
      by_config[config].append(Request(place, context, self._pictures(doc_to_visual, task, split, doc_id)))
    for config, group in by_config.items():
      engine = self._engine(config)
      for inputs, batch in self._batches(group, config.max_new_tokens):
        answers = engine(inputs, [request.place for request in batch]).tokens
        for request, tokens in zip(batch, answers, strict=False):
          text = _cut(self._processor.decode(tokens), stops[request.place])
          results[request.place] = GenerationResult(text, TokenCounts(output_tokens=len(tokens)))
          self.cache_hook.add_partial("generate_until", requests[request.place].args[:2], text)
    return results

  def loglikelihood(self, requests: Sequence[Any]) -> list[GenerationResult]:
    """The mean negative log-likelihood of a token of every continuation, and whether the model would say it.

    lmms-eval takes the lowest of several choices, since most of its models return a loss. One that cannot be prepared is
    infinite, with a warning.

    Returns:
      The pairs as results of generation, since lmms-eval makes text of all others.
    """
    results = [GenerationResult((float("inf"), False))] * len(requests)
    places = collections.defaultdict(list)  # of the requests with a prompt in common
    for place, request in enumerate(requests):
      context, _, *more = request.args
      places[(context, *(more[1:] or ("", 0, "")))].append(place)
    first = {own[0]: own for own in places.values()}
    prompts = [self._scored(place, requests[place].args) for place in first]
    engine = self._engine(GenerationConfig(seed=self.settings.seed))
    for inputs, batch in self._batches(prompts, ROOM):
      wanted = [
        [self._continuation(request.text, self._target(requests[place].args)) for place in first[request.place]]
        for request in batch
      ]
      scores = engine.score(inputs, [request.place for request in batch], wanted)
      for request, given, own in zip(batch, wanted, scores, strict=True):
        for place, tokens, score in zip(first[request.place], given, own, strict=True):
          results[place] = GenerationResult((-score.log_probability / len(tokens), score.is_greedy))
    return results

  def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
    raise UserError("tasks of several rounds are not supported")

  def _generation(self, settings: dict[str, Any]) -> tuple[GenerationConfig, list[str]]:
    """The generation config and the texts that end an answer."""
    until = settings.get("until") or []
    sampling = Sampling()
    if settings.get("do_sample") and settings.get("temperature"):
      sampling = Sampling(float(settings["temperature"]), float(settings.get("top_p") or 1.0))
    if (settings.get("num_beams") or 1) > 1:
      logging.log_first_n(logging.WARNING, "beam search is not supported; answers are greedy", 1)
    max_new_tokens = int(settings.get("max_new_tokens") or self.settings.max_new_tokens)
    return GenerationConfig(max_new_tokens, sampling, self.settings.seed), [until] if isinstance(until, str) else until

  def _pictures(self, doc_to_visual: Callable, task: str, split: str, doc_id: int) -> Callable[[], list]:
    return lambda: list(doc_to_visual(self.task_dict[task][split][doc_id]) or [])

  def _scored(self, place: int, arguments: Sequence[Any]) -> Request:
    context, _, *more = arguments
    if not more:  # a continuation without a prompt
      return Request(place, context, list)
    doc_to_visual, doc_id, task, split = more
    return Request(place, context, self._pictures(doc_to_visual, task, split, doc_id))

  def _target(self, arguments: Sequence[Any]) -> str:
    target = arguments[1]
    if callable(target):
      _, _, _, doc_id, task, split = arguments
      target = target(self.task_dict[task][split][doc_id])
    return str(target)

  def _continuation(self, text: str, target: str) -> list[int]:
    """The tokens that a continuation adds to the prompt, or its own if the two grow together."""
    tokenize = functools.partial(self._loaded.processor.tokenizer, add_special_tokens=False)
    prompt = self._processor.prompt(text, 0)
    before, both = tokenize(prompt)["input_ids"], tokenize(prompt + target)["input_ids"]
    added = both[len(before) :] if both[: len(before)] == before else []
    return added or tokenize(target)["input_ids"]

  def _engine(self, config: GenerationConfig) -> Engine:
    return Engine(self._loaded.model, self._schedule, config, eos_token_ids=self._loaded.eos_token_ids)

  def _batches(self, requests: Sequence[Request], max_new_tokens: int) -> Iterator[tuple[Inputs, list[Request]]]:
    """Yields batches of requests of one bucket each; sizes of pictures are read first, then pictures are prepared."""
    sizes = collections.Counter()
    for request in requests:
      try:
        sizes[self._processor.image_size([picture.size for picture in request.pictures()])] += 1
      except (UserError, AttributeError):
        continue  # reported below
    buckets = self.settings.prompt_buckets or DEFAULT_BUCKETS
    batcher = generation.make_batcher(self._loaded, self._processor, sizes, buckets, max_new_tokens, self._schedule)
    for bucket, batch in in_batches(self._prepared(requests, batcher), self._batch_size):
      examples = [example for _, example in batch]
      yield batcher.pack(examples, bucket=bucket, batch_size=self._batch_size), [request for request, _ in batch]

  def _prepared(
    self, requests: Sequence[Request], batcher: Batcher
  ) -> Iterator[tuple[Bucket, tuple[Request, Example]]]:
    """Yields the requests that can be prepared; the others have a warning."""
    with Progress(len(requests), "request", "answering") as progress:
      for request in requests:
        try:
          example = self._example(request)
          prepared = batcher.bucket(example), (request, example)
        except UserError as error:
          logging.warning("request %d is not answered: %s", request.place, error)
        else:
          yield prepared
        progress.update()

  def _example(self, request: Request) -> Example:
    pictures = request.pictures()
    for picture in pictures:
      if not isinstance(picture, PIL.Image.Image):
        raise UserError(f"only pictures are supported, not {type(picture).__name__}")
    return self._processor.prepare([picture.convert("RGB") for picture in pictures], request.text)


def _cut(text: str, stops: Sequence[str]) -> str:
  """The text up to the first of these texts."""
  return text[: min((text.index(stop) for stop in stops if stop and stop in text), default=len(text))]
