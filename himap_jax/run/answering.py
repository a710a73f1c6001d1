"""The main loop: prepares prompts, answers them in batches, writes rows."""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from himap_jax.engine import processes
from himap_jax.engine.batching import Batcher, Bucket
from himap_jax.engine.engine import Batch, Engine
from himap_jax.engine.pool import Answered, Request
from himap_jax.engine.processes import Share
from himap_jax.engine.sampling import Sampling
from himap_jax.errors import NOT_FINITE, UserError
from himap_jax.families.family import Processor
from himap_jax.inputs import Example
from himap_jax.run import drawing
from himap_jax.run.output import Output
from himap_jax.run.progress import Progress
from himap_jax.run.prompts import Prompt
from himap_jax.run.reader import MAX_WAITING_ERRORS, Prepared, Reader
from himap_jax.run.summary import Result, Summary
from himap_jax.run.user_errors import out_of_memory_is_user_error, user_error
from himap_jax.run.writer import COUNTS
from himap_jax.stops import cut_at_stop, stop_condition


@dataclasses.dataclass(frozen=True)
class Answerer:
  """Answers prompts with output rows.

  Attributes:
    emit: extra fields of a row: `tokens`, `kept`, `patches`, `counts`, `logits`, `timing`.
    pictures: directory for pictures of kept patches, if any.
  """

  processor: Processor
  batcher: Batcher
  engine: Engine
  emit: frozenset[str] = frozenset()
  pictures: pathlib.Path | None = None

  def answer_all(self, output: Output, share: Share = Share()) -> Summary:
    """Answers every prompt that has no answer yet; a bad row becomes an error row.

    Every process of the run calls this and prepares its share of the prompts. All processes receive all rows, and the
    first process writes them.

    Raises:
      UserError: a file cannot be written, or device memory is exhausted; rows written before are complete.
    """
    contract, buckets = output.contract, self.batcher.buckets
    todo = np.flatnonzero(~output.answered)
    is_own = np.zeros(len(contract.prompts), bool)
    is_own[todo[share.index :: share.count]] = True
    summary = Summary(num_skipped=len(contract.prompts) - len(todo))

    def prepare(prompt: Prompt) -> tuple[Bucket, Prepared]:
      loaded = [contract.files.load(image) for image in prompt.images]
      example = self.processor.prepare([image for image, _ in loaded], prompt.question)
      digest = contract.row_digest(prompt, [digest for _, digest in loaded])
      own = dataclasses.replace(prompt, images=())
      return self.batcher.bucket(example), Prepared(own, example, self._request(own), digest)

    reader = Reader(contract.prompts.where(is_own), prepare, buckets)
    progress = Progress(len(todo), "row", "answering", shown=processes.is_leader())

    def write(answered: Sequence[Answered] = ()) -> list[Result]:
      results = [Result(prompt.row(contract.row_digest(prompt), error=error)) for prompt, error in reader.take_errors()]
      if share.is_written_here:
        results += [self._result(row) for row in answered]
      results = _gather_results(results if share.is_written_here else [])
      output.write([result.row for result in results])
      summary.count(results)
      progress.update(len(results))
      return results

    start = time.perf_counter()
    with progress, ThreadPoolExecutor(max_workers=1) as thread, reader:
      turns = self.engine.answer(self._batches(reader, share, thread, write))
      answered: list[Answered] | None = []
      shown = None
      while answered is not None:
        with out_of_memory_is_user_error(lambda: self._what_is_run(reader)):
          answered = next(turns, None)
        results = write(answered or ())
        if shown != self.engine.capacity.chosen and answered is not None:
          shown = self.engine.capacity.chosen
          if processes.is_leader():
            progress.print(f"batch sizes: {self.engine.capacity.describe()}")
        if results:
          logging.log_first_n(logging.INFO, "ready: first rows", 1)
    summary.seconds = time.perf_counter() - start
    return summary

  def _batches(
    self, reader: Reader, share: Share, thread: ThreadPoolExecutor, write: Callable[[], Any]
  ) -> Iterator[Batch]:
    """Yields batches that all processes agree on, each of the bucket whose batch is the fullest; reads ahead.

    Calls `write` in all processes when many errors wait in one.
    """
    pack = self.batcher.pack
    reading = thread.submit(reader.read)
    while True:
      reading.result()
      if processes.sum_over_processes([reader.num_errors]) >= MAX_WAITING_ERRORS:
        write()
        reading = thread.submit(reader.read)
        continue
      index = processes.fullest(reader.filled())
      if index is None:
        return
      bucket = self.batcher.buckets[index]
      if bucket not in reader.num_rows:
        try:
          count = self.engine.prefill_rows(pack([], bucket=bucket, batch_size=1))
          reader.num_rows[bucket] = count // share.count
        except UserError as error:
          reader.refuse(bucket, str(error))
        reading = thread.submit(reader.read)
        continue
      group = reader.take(bucket)
      _check_equal([row.digest for row in group], share)
      reading = thread.submit(reader.read)
      inputs = pack([row.example for row in group], bucket=bucket, batch_size=reader.num_rows[bucket])
      if self.pictures is None and "patches" not in self.emit:
        group = [row._replace(example=_without_pixels(row.example)) for row in group]
      yield Batch(inputs, [dataclasses.replace(row.request, tag=(row, bucket)) for row in group])

  def _what_is_run(self, reader: Reader) -> str:
    """The sizes of what devices hold, for messages."""
    bucket, capacity = reader.last or self.batcher.buckets[-1], self.engine.capacity
    size = f"rows of {bucket.num_image_tokens} image tokens and {bucket.num_text_slots} text tokens"
    return f"{size}, {capacity.describe()}" if capacity.chosen.decode else size

  def _request(self, prompt: Prompt) -> Request:
    """What a prompt asks of the engine; raises `UserError` if the engine does not do it."""
    options, given = prompt.options, self.engine.generation
    most = given.max_new_tokens
    if (options.max_new_tokens or 0) > most:
      raise UserError(f"max_new_tokens is {options.max_new_tokens}, but --max_new_tokens allows {most}")
    temperature = given.sampling.temperature if options.temperature is None else options.temperature
    top_p = given.sampling.top_p if options.top_p is None and temperature > 0 else options.top_p
    return Request(
      prompt.key,
      max_new_tokens=options.max_new_tokens,
      sampling=Sampling(temperature, 1.0 if top_p is None else top_p),
      is_complete=stop_condition(self.processor, options.stop),
    )

  def _result(self, answered: Answered) -> Result:
    (prompt, example, _, digest), bucket = answered.request.tag
    logits, tokens, kept = answered.logits, answered.tokens, answered.kept
    if not answered.is_finite:
      return Result(prompt.row(digest, error=NOT_FINITE))
    if self.pictures is not None:
      self._draw(prompt, example, kept, digest)
    more: dict[str, Any] = {"token_ids": tokens} if "tokens" in self.emit else {}
    if "kept" in self.emit:
      more["kept"] = kept
    if "patches" in self.emit:
      places = self.processor.places(example)
      more["kept_patches"] = [places[stage].tolist() for stage in kept]
    counts = (example.size.num_tiles, example.num_image_tokens, example.num_text_tokens)
    if "counts" in self.emit:
      more["counts"] = dict(zip(COUNTS, (*counts, list(map(len, kept))), strict=True))
    if "logits" in self.emit:
      more["first_logits"] = logits.tolist()
    if "timing" in self.emit:
      more["timing"] = {name: getattr(answered, name) for name in ("prefill_seconds", "decode_seconds")}
    row = prompt.row(digest, answer=cut_at_stop(self.processor.decode(tokens), prompt.options.stop), **more)
    num_slots = bucket.num_image_tokens + bucket.num_text_slots
    return Result(row, len(tokens), *counts, [len(stage) for stage in kept], num_slots, bucket.num_tiles)

  def _draw(self, prompt: Prompt, example: Example, kept: Sequence[Sequence[int]], digest: str) -> None:
    if not example.num_images:
      return
    picture = drawing.draw_kept(self.processor.views(example), kept)
    path = self.pictures / f"{prompt.file_name}.png"
    with user_error(f"--pictures: cannot write {path}"):
      drawing.save(picture, path, digest)


def _without_pixels(example: Example) -> Example:
  """The example without the values of its pixels; it has as many pictures or tiles."""
  images = example.images
  return dataclasses.replace(example, images=dataclasses.replace(images, pixels=images.pixels[..., :0].copy()))


def _check_equal(digests: Sequence[str], share: Share) -> None:
  """Raises `UserError` in all processes if some that prepare the same rows, for devices of theirs, read others."""
  if share.count < jax.process_count() and not processes.is_equal(" ".join(digests), share):
    raise UserError(
      "processes that prepare the same rows have read different prompts or pictures; see that all can read them, and "
      "start the same command again"
    )


def _gather_results(results: list[Result]) -> list[Result]:
  """Gathers the results of all processes in each of them."""
  if jax.process_count() == 1:
    return results
  data = np.frombuffer(json.dumps(results).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.array([data.size])).ravel()
  padded = np.zeros(1 << (int(sizes.max()) - 1).bit_length(), np.uint8)  # few shapes, hence few programs
  padded[: data.size] = data
  gathered = zip(multihost_utils.process_allgather(padded), sizes, strict=True)
  return [Result(*result) for data, size in gathered for result in json.loads(data[:size].tobytes())]
