"""The main loop: prompts into batches, batches through the model, answers into the output file."""

import dataclasses
import pathlib
import re
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from absl import logging
from tqdm import tqdm

from himap_jax.generation import Generation, Generator
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
    prefill_seconds: time in prefill programs.
    decode_seconds: time in decode programs.
  """

  num_answered: int = 0
  num_errors: int = 0
  num_skipped: int = 0
  num_text_tokens: int = 0
  num_new_tokens: int = 0
  prefill_seconds: float = 0.0
  decode_seconds: float = 0.0


def answer_all(
  prompts: Sequence[Prompt | RowError],
  processor: Processor,
  generator: Generator,
  writer: OutputWriter,
  *,
  image_dir: pathlib.Path,
  batch_size: int,
  emit: frozenset[str],
  pictures: pathlib.Path | None,
) -> Summary:
  """Answers every prompt that the output does not hold yet, batch by batch; a bad row becomes an error row."""
  summary = Summary()
  todo = [prompt for prompt in prompts if prompt.id not in writer.answered]
  summary.num_skipped = len(prompts) - len(todo)
  with tqdm(total=len(todo), unit="row", disable=None) as progress:
    for group in _prefetch(_batches(todo, processor, image_dir=image_dir, batch_size=batch_size)):
      if isinstance(group, RowError):
        rows = [_error_row(group)]
      else:
        rows = _answer(group, processor, generator, summary, batch_size=batch_size, emit=emit, pictures=pictures)
      writer.write(rows)
      logging.log_first_n(logging.INFO, "ready: first rows", 1)
      summary.num_errors += sum(row["error"] is not None for row in rows)
      progress.update(len(rows))
  return summary


Group = list[tuple[Prompt, Example]]


def _batches(
  prompts: Sequence[Prompt | RowError], processor: Processor, *, image_dir: pathlib.Path, batch_size: int
) -> Iterator[RowError | Group]:
  """Groups prompts of one bucket; what cannot be prepared comes out as an error at once."""
  waiting: dict[int, Group] = {}
  for prompt in prompts:
    if isinstance(prompt, RowError):
      yield prompt
      continue
    try:
      example = processor.prepare(load_image(image_dir / prompt.image), prompt.question)
    except ValueError as error:
      yield RowError(prompt.id, str(error))
      continue
    group = waiting.setdefault(processor.bucket(example), [])
    group.append((prompt, example))
    if len(group) == batch_size:
      yield waiting.pop(processor.bucket(example))
  yield from waiting.values()


def _prefetch(items: Iterator[RowError | Group]) -> Iterator[RowError | Group]:
  """The same items; the next one is made by a thread while the one before it is in use."""
  with ThreadPoolExecutor(max_workers=1) as thread:
    following = thread.submit(next, items, None)
    while (item := following.result()) is not None:
      following = thread.submit(next, items, None)
      yield item


def _answer(
  group: Group,
  processor: Processor,
  generator: Generator,
  summary: Summary,
  *,
  batch_size: int,
  emit: frozenset[str],
  pictures: pathlib.Path | None,
) -> list[dict[str, Any]]:
  examples = [example for _, example in group]
  ids = [prompt.id for prompt, _ in group]
  inputs = processor.batch(examples, bucket=processor.bucket(examples[0]), batch_size=batch_size)
  result = generator(inputs, ids + ids[-1:] * (batch_size - len(ids)))
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
