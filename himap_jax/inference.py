"""The main loop: prompts into batches, batches through the model, answers into the output file."""

import collections
import dataclasses
import pathlib
import re
import time
import zlib
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from absl import logging
from tqdm import tqdm

from himap_jax import hosts
from himap_jax.adaptive_generation import AdaptiveGenerator
from himap_jax.generation import Generation, Generator
from himap_jax.hosts import Share
from himap_jax.images import load_image
from himap_jax.output import OutputWriter
from himap_jax.processing import Example, Processor
from himap_jax.prompts import Prompt, RowError
from himap_jax.visualize import draw_kept


@dataclasses.dataclass
class Summary:
  """What a run did.

  Attributes:
    num_answered: rows that were answered.
    num_errors: rows that were reported as errors.
    num_skipped: rows that the output held already.
    num_text_tokens: text tokens of the answered prompts.
    num_new_tokens: tokens generated.
    num_by_rung: where there is a ladder of schedules, answered rows on each rung.
    prefill_seconds: time in prefill programs.
    decode_seconds: time in decode programs.
    seconds: from the first prompt to the last row, compiling included.
  """

  num_answered: int = 0
  num_errors: int = 0
  num_skipped: int = 0
  num_text_tokens: int = 0
  num_new_tokens: int = 0
  num_by_rung: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
  prefill_seconds: float = 0.0
  decode_seconds: float = 0.0
  seconds: float = 0.0


def answer_all(
  prompts: Sequence[Prompt | RowError],
  processor: Processor,
  generator: Generator | AdaptiveGenerator,
  writer: OutputWriter | None,
  *,
  answered: Collection[str | int],
  image_dir: pathlib.Path,
  rows_at_once: int,
  multiple: int,
  emit: frozenset[str],
  pictures: pathlib.Path | None,
  share: Share = Share(),
) -> Summary:
  """Answers every prompt that has no answer yet, batch by batch; a bad row becomes an error row.

  Args:
    prompts: all prompts, in the same order in every process.
    processor: prepares them.
    generator: answers them.
    writer: takes the rows; None where another process writes this one's.
    answered: ids that have an answer.
    image_dir: where relative paths of images begin.
    rows_at_once: rows that this process prepares for a call of the generator, at most.
    multiple: their number is padded to a multiple of it.
    emit: see `himap_jax.run`.
    pictures: a directory for pictures of kept patches, or None.
    share: which prompts this process prepares.
  """
  todo = [prompt for prompt in prompts if prompt.id not in answered]
  summary = Summary(num_skipped=len(prompts) - len(todo))
  todo = todo[share.index :: share.count]
  start = time.perf_counter()
  reader = _Reader(todo, processor, image_dir=image_dir, batch_size=rows_at_once)
  with tqdm(total=len(todo), unit="row", disable=None) as progress, ThreadPoolExecutor(max_workers=1) as thread:
    reading = thread.submit(reader.read)
    while True:
      reading.result()
      rows = [_error_row(error) for error in reader.take_errors()]
      index = hosts.fullest(reader.counts())
      group = [] if index is None else reader.take(processor.buckets[index])
      reading = thread.submit(reader.read)
      if index is not None:
        rows += _answer(
          group,
          processor,
          generator,
          summary,
          bucket=processor.buckets[index],
          multiple=multiple,
          emit=emit,
          pictures=pictures if writer is not None else None,
        )
      if writer is not None and rows:
        writer.write(rows)
        logging.log_first_n(logging.INFO, "ready: first rows", 1)
      summary.num_errors += sum(row["error"] is not None for row in rows)
      progress.update(len(rows))
      if index is None:
        summary.seconds = time.perf_counter() - start
        return summary


def of_all(summary: Summary, share: Share) -> Summary:
  """The summary with the counts of all processes; their times are alike, since they run the same programs together."""
  names = ("num_answered", "num_errors", "num_text_tokens", "num_new_tokens")
  counts = hosts.sum_of_all([getattr(summary, name) if share.is_written_here else 0 for name in names])
  return dataclasses.replace(summary, **{name: int(count) for name, count in zip(names, counts, strict=True)})


Group = list[tuple[Prompt, Example]]


class _Reader:
  """Prepares prompts ahead of their batches and sorts them by bucket; what cannot be prepared becomes an error."""

  def __init__(
    self,
    prompts: Sequence[Prompt | RowError],
    processor: Processor,
    *,
    image_dir: pathlib.Path,
    batch_size: int,
  ):
    self._prompts = iter(prompts)
    self._processor = processor
    self._image_dir = image_dir
    self._batch_size = batch_size
    self._waiting: dict[int, Group] = {bucket: [] for bucket in processor.buckets}
    self._errors: list[RowError] = []

  def read(self) -> None:
    """Reads on until some bucket fills a batch, or to the end."""
    while max(self.counts()) < self._batch_size:
      prompt = next(self._prompts, None)
      if prompt is None:
        return
      if isinstance(prompt, RowError):
        self._errors.append(prompt)
        continue
      try:
        example = self._processor.prepare(load_image(self._image_dir / prompt.image), prompt.question)
      except ValueError as error:
        self._errors.append(RowError(prompt.id, str(error)))
        continue
      self._waiting[self._processor.bucket(example)].append((prompt, example))

  def counts(self) -> list[int]:
    """Rows that wait, by bucket."""
    return [len(group) for group in self._waiting.values()]

  def take(self, bucket: int) -> Group:
    """The rows of the next batch."""
    group = self._waiting[bucket]
    self._waiting[bucket] = group[self._batch_size :]
    return group[: self._batch_size]

  def take_errors(self) -> list[RowError]:
    """The errors since the last call."""
    errors, self._errors = self._errors, []
    return errors


def _answer(
  group: Group,
  processor: Processor,
  generator: Generator | AdaptiveGenerator,
  summary: Summary,
  *,
  bucket: int,
  multiple: int,
  emit: frozenset[str],
  pictures: pathlib.Path | None,
) -> list[dict[str, Any]]:
  examples = [example for _, example in group]
  ids = [prompt.id for prompt, _ in group]
  batch_size = max(1, -(-len(group) // multiple)) * multiple
  inputs = processor.batch(examples, bucket=bucket, batch_size=batch_size)
  result = generator(inputs, ids + (ids[-1:] or [0]) * (batch_size - len(ids)))
  summary.prefill_seconds += result.prefill_seconds
  summary.decode_seconds += result.decode_seconds
  rows = []
  for index, (prompt, example) in enumerate(group):
    if not np.isfinite(result.logits[index]).all():
      rows.append(_error_row(RowError(prompt.id, "the model's logits are not finite; try --dtype=float32")))
      continue
    summary.num_answered += 1
    summary.num_text_tokens += example.num_text_tokens
    summary.num_new_tokens += len(result.tokens[index])
    if result.rungs is not None:
      summary.num_by_rung[int(result.rungs[index])] += 1
    rows.append(_answer_row(prompt, result, index, processor, len(group), emit))
    if pictures is not None:
      kept = [stage[index].tolist() for stage in result.kept]
      picture = draw_kept(processor.picture(example), kept, processor.patch_grid)
      picture.save(pictures / f"{_file_name(prompt.id)}.png", format="PNG")
  return rows


def _answer_row(
  prompt: Prompt, result: Generation, index: int, processor: Processor, num_rows: int, emit: frozenset[str]
) -> dict[str, Any]:
  row = {"id": prompt.id, "answer": processor.decode(result.tokens[index]), "error": None}
  if "tokens" in emit:
    row["token_ids"] = result.tokens[index]
  if "kept" in emit:
    row["kept"] = [stage[index].tolist() for stage in result.kept]
  if "logits" in emit:
    row["first_logits"] = result.logits[index].tolist()
  if "timing" in emit:
    row["timing"] = {
      "prefill_seconds": result.prefill_seconds / num_rows,
      "decode_seconds": result.decode_seconds / num_rows,
      "rows_in_batch": num_rows,
    }
  return row


def _error_row(error: RowError) -> dict[str, Any]:
  return {"id": error.id, "answer": None, "error": error.message}


def _file_name(row_id: str | int) -> str:
  """The id where it can name a file, else what can of it and a checksum."""
  name = re.sub(r"[^\w.-]", "_", str(row_id), flags=re.ASCII)[:100]
  return name if name == str(row_id) else f"{name}-{zlib.crc32(str(row_id).encode()):08x}"
