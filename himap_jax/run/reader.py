"""The reader of prompts, which prepares them ahead of their batches."""

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from himap_jax.engine.batching import Bucket
from himap_jax.engine.pool import Request
from himap_jax.errors import UserError
from himap_jax.inputs import Example
from himap_jax.run.prompts import Prompt

MAX_WAITING_ERRORS = 256
MAX_WAITING_BATCHES, MAX_WAITING_BYTES = 16, 1 << 31  # of rows, if both are exceeded


class Prepared(NamedTuple):
  """A prompt, without its pictures, that is ready for the model, with its request and the digest of its output row."""

  prompt: Prompt
  example: Example
  request: Request
  digest: str


class Reader(contextlib.AbstractContextManager):
  """Prepares prompts ahead of their batches, sorts them by bucket, and collects errors, without the pictures.

  As a context manager it ends, when left, after the prompt that another thread is reading.

  Where a method needs a bucket for every size of pictures, most rows would wait to the end for others of their size:
  above both `MAX_WAITING_BATCHES` and `MAX_WAITING_BYTES` reading stops, and the fullest bucket runs with the rows it has.

  Attributes:
    num_rows: rows of a batch, of buckets for which it is known.
    refused: why the rows of a bucket cannot be answered.
    last: the bucket that was taken last.
  """

  def __init__(
    self, prompts: Iterable[Prompt], prepare: Callable[[Prompt], tuple[Bucket, Prepared]], buckets: Sequence[Bucket]
  ):
    """`prepare` may raise `UserError`, which makes the prompt an error."""
    self._prompts, self._prepare = iter(prompts), prepare
    self._waiting: dict[Bucket, list[Prepared]] = {bucket: [] for bucket in buckets}
    self.num_rows: dict[Bucket, int] = {}
    self.refused: dict[Bucket, str] = {}
    self.last: Bucket | None = None
    self._errors: collections.deque[tuple[Prompt, str]] = collections.deque()
    self._is_ended = False
    self._num_bytes = 0  # of the pictures of all waiting rows

  def __exit__(self, *exception: object) -> None:
    self._is_ended = True

  def read(self) -> None:
    """Reads until a bucket fills a batch or has a first row, too much waits, or to the end."""
    while not self._is_ended and max(self.filled()) < 1 and not self._has_enough:
      prompt = next(self._prompts, None)
      if prompt is None:
        return
      try:
        if prompt.error is not None:
          raise UserError(prompt.error)
        bucket, prepared = self._prepare(prompt)
        if bucket in self.refused:
          raise UserError(self.refused[bucket])
        self._waiting[bucket].append(prepared)
        self._num_bytes += _num_bytes([prepared])
      except UserError as error:
        self._fail(prompt, str(error))

  @property
  def _has_enough(self) -> bool:
    """Whether there are `MAX_WAITING_ERRORS`, or rows of many buckets would take more and more memory."""
    if self.num_errors >= MAX_WAITING_ERRORS:
      return True
    return self._num_bytes > MAX_WAITING_BYTES and sum(self.filled()) > MAX_WAITING_BATCHES

  @property
  def num_errors(self) -> int:
    """Prompts that failed since the last call of `take_errors`."""
    return len(self._errors)

  def _fail(self, prompt: Prompt, error: str) -> None:
    self._errors.append((dataclasses.replace(prompt, images=()), error))

  def filled(self) -> list[float]:
    """Batches of waiting rows, by bucket."""
    return [len(group) / self.num_rows.get(bucket, 1) for bucket, group in self._waiting.items()]

  def refuse(self, bucket: Bucket, error: str) -> None:
    """Makes the rows of a bucket errors, also those to come."""
    self.refused[bucket] = error
    for row in self._waiting[bucket]:
      self._fail(row.prompt, error)
    self._remove(bucket, len(self._waiting[bucket]))

  def take(self, bucket: Bucket) -> list[Prepared]:
    """Removes and returns the rows of the next batch."""
    self.last = bucket
    return self._remove(bucket, self.num_rows[bucket])

  def _remove(self, bucket: Bucket, count: int) -> list[Prepared]:
    """Removes and returns the first rows of a bucket."""
    group = self._waiting[bucket][:count]
    self._waiting[bucket] = self._waiting[bucket][count:]
    self._num_bytes -= _num_bytes(group)
    return group

  def take_errors(self) -> list[tuple[Prompt, str]]:
    """Returns the prompts that failed since the last call, with their messages; also while another thread reads."""
    return [self._errors.popleft() for _ in range(len(self._errors))]


def _num_bytes(rows: Sequence[Prepared]) -> int:
  return sum(row.example.images.pixels.nbytes for row in rows)
