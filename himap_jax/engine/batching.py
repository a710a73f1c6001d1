"""Batches of static shape; no other module decides shapes.

Axes: B rows, S slots, A axes of positions (none for one).
"""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from himap_jax.errors import UserError
from himap_jax.inputs import IMAGE, PADDING, TEXT, Example, Images, ImageSize, Inputs, Layout

DEFAULT_BUCKETS = (64, 128, 256, 512, 1024, 2048)
MAX_IMAGE_BUCKETS = 16
IMAGE_WASTE = 0.1, 0.05  # shares of the tiles and of the image tokens; more buckets are made until no more is padding


class ImageBucket(NamedTuple):
  """Tiles (or patches) and image tokens to which rows are padded; if it is not ragged, all rows have that many."""

  num_tiles: int
  num_image_tokens: int
  is_ragged: bool = False


class Bucket(NamedTuple):
  """The shape of a batch besides its rows: as `ImageBucket`, and slots for the text."""

  num_tiles: int
  num_image_tokens: int
  num_text_slots: int
  is_ragged: bool = False

  def holds(self, size: ImageSize) -> bool:
    """Whether it holds a row's pictures."""
    own = ImageSize(self.num_tiles, self.num_image_tokens)
    return own == size or (self.is_ragged and all(x <= y for x, y in zip(size, own, strict=True)))


def image_buckets(sizes: Mapping[ImageSize, int], *, exact: bool = False) -> tuple[ImageBucket, ...]:
  """Buckets with the least padding, as few as bring it to `IMAGE_WASTE` or below, but at most `MAX_IMAGE_BUCKETS`.

  Rows without pictures have one more.

  Args:
    sizes: row count per size.
    exact: pad nothing.
  """
  rows = sorted((size for size in sizes if size.num_tokens), key=lambda size: (size.num_tokens, size.num_tiles))
  without = (ImageBucket(0, 0),) * (len(rows) < len(sizes))
  if exact or len(rows) < 2:
    return without + tuple(ImageBucket(*size) for size in rows)
  for chosen in _best_groups(rows, sizes, min(MAX_IMAGE_BUCKETS, len(rows))):
    if all(own <= most for own, most in zip(_waste(chosen, sizes), IMAGE_WASTE, strict=True)):
      break
  return without + tuple(ImageBucket(*_largest(group), len(group) > 1) for group in chosen)


def _largest(group: Sequence[ImageSize]) -> ImageSize:
  return ImageSize(*(max(values) for values in zip(*group, strict=True)))


def _waste(groups: Sequence[Sequence[ImageSize]], counts: Mapping[ImageSize, int]) -> tuple[float, float]:
  """Shares of the tiles and of the image tokens that are padding if every group is padded to its largest."""
  num_rows = [np.array([counts[size] for size in group]) for group in groups]
  used = sum(own @ np.array(group) for own, group in zip(num_rows, groups, strict=True))
  padded = sum(own.sum() * np.array(_largest(group)) for own, group in zip(num_rows, groups, strict=True))
  tiles, tokens = 1 - used / np.maximum(padded, 1)
  return float(tiles), float(tokens)


def _best_groups(
  rows: Sequence[ImageSize], counts: Mapping[ImageSize, int], most: int
) -> Iterator[list[list[ImageSize]]]:
  """Splits sorted sizes into one, two, … and `most` consecutive groups with the least padding, by dynamic programming.

  Padding is the sum of two ratios to what is used: of tiles and of image tokens.
  """
  num_rows, sizes = np.array([counts[size] for size in rows]), np.array(rows)
  below, used = np.concatenate([[0], np.cumsum(num_rows)]), np.maximum(num_rows @ sizes, 1)
  best = np.full((most + 1, len(rows) + 1), np.inf)
  start = np.zeros((most + 1, len(rows) + 1), int)
  best[0, 0] = 0
  for end in range(1, len(rows) + 1):
    largest = np.maximum.accumulate(sizes[:end][::-1])[::-1]  # of the sizes from each start on
    padded = (below[end] - below[:end]) * (largest / used).sum(axis=1)
    total = best[:-1, :end] + padded
    start[1:, end] = total.argmin(axis=1)
    best[1:, end] = total.min(axis=1)
  for num_groups in range(1, most + 1):
    groups, end = [], len(rows)
    for group in range(num_groups, 0, -1):
      first = start[group, end]
      groups.append(list(rows[first:end]))
      end = first
    yield groups[::-1]


def in_batches(
  rows: Iterable[tuple[Bucket, Any]], num_rows: Callable[[Bucket], int]
) -> Iterator[tuple[Bucket, list[Any]]]:
  """Yields batches of rows of one bucket each as soon as they are full, and in the end those that are not.

  Args:
    num_rows: of a batch of a bucket.
  """
  waiting: dict[Bucket, list[Any]] = collections.defaultdict(list)
  for bucket, row in rows:
    waiting[bucket].append(row)
    if len(waiting[bucket]) == num_rows(bucket):
      yield bucket, waiting.pop(bucket)
  yield from waiting.items()


class Batcher:
  """Packs prepared prompts into batches.

  Attributes:
    buckets: all that a batch can have; a row's is the first that holds it.
  """

  def __init__(
    self,
    context: int,
    blank: Example,
    image_buckets: Sequence[ImageBucket],
    *,
    buckets: Sequence[int] = DEFAULT_BUCKETS,
    max_new_tokens: int = 0,
  ):
    """Checks the buckets against the model.

    Args:
      context: most tokens of a prompt and its answer.
      blank: any prompt, which gives the shapes of tiles and positions.
      image_buckets: as the function gives them; those that the context does not hold are left out.
      buckets: padded text lengths, ascending; doublings of the last are added, and the longest that the context holds
        beside the image tokens of any row in the bucket.
      max_new_tokens: tokens to leave room for in the context.

    Raises:
      UserError: the buckets are invalid, or the context is too small for all of them.
    """
    self._context, self._blank_example, self._max_new_tokens = context, blank, max_new_tokens
    if not buckets or any(b < 1 for b in buckets) or sorted(set(buckets)) != list(buckets):
      raise UserError(f"prompt buckets must be positive and ascending, not {','.join(map(str, buckets))}")
    self.buckets = tuple(
      Bucket(own.num_tiles, own.num_image_tokens, length, own.is_ragged)
      for own in image_buckets
      if self._longest_text(own.num_image_tokens) > 0
      for length in _lengths(buckets, self._longest_text(1 if own.is_ragged else own.num_image_tokens))
    )
    if not self.buckets:
      raise UserError(self._too_many(min(own.num_image_tokens for own in image_buckets)))

  @property
  def most_image_tokens(self) -> int:
    """Image tokens of the largest bucket."""
    return max(bucket.num_image_tokens for bucket in self.buckets)

  def bucket(self, example: Example) -> Bucket:
    """The first bucket that holds an example; raises `UserError` if the prompt exceeds the context."""
    size, length = example.size, example.num_text_tokens
    longest = self._longest_text(size.num_tokens)
    if longest < 1:
      raise UserError(self._too_many(size.num_tokens))
    fitting = [bucket for bucket in self.buckets if bucket.holds(size)]
    if not fitting:
      raise UserError(f"the pictures have another size than when the run started ({size.num_tokens} image tokens)")
    if length > longest:
      raise UserError(
        f"the prompt has {length} text tokens; with {size.num_tokens} image tokens the model's context leaves room for "
        f"{longest}"
      )
    return next(bucket for bucket in fitting if length <= bucket.num_text_slots)

  def pack(self, examples: Sequence[Example], *, bucket: Bucket, batch_size: int) -> Inputs:
    """Packs examples into arrays whose shape depends only on `bucket` and `batch_size`.

    Missing rows repeat the last example, or are blank if there is none.
    """
    filler = examples[-1] if examples else self._blank(bucket)
    rows = [*examples, *[filler] * (batch_size - len(examples))]
    shape = (batch_size, bucket.num_text_slots + bucket.num_image_tokens)
    tokens, image_id = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    positions = np.zeros((*shape, *self._blank_example.positions.shape[1:]), np.int32)
    kind = np.full(shape, PADDING, np.int32)
    for row, example in enumerate(rows):
      used = slice(len(example.tokens))
      tokens[row, used], positions[row, used] = example.tokens, example.positions
      image_id[row, used] = example.image_id
      kind[row, used] = np.where(example.image_id >= 0, IMAGE, TEXT)
    images = [_padded(example.images, bucket) for example in rows]
    return Inputs(
      tokens=tokens,
      layout=Layout.of_rows(kind, image_id, bucket.num_image_tokens, is_ragged=bucket.is_ragged),
      positions=positions,
      images=jax.tree.map(lambda *leaves: np.stack(leaves), *images),
    )

  def _longest_text(self, num_image_tokens: int) -> int:
    """Text tokens for which the context has room; below one if there is none."""
    return self._context - num_image_tokens - self._max_new_tokens

  def _too_many(self, num_image_tokens: int) -> str:
    return (
      f"the model's context of {self._context} tokens does not hold {num_image_tokens} image tokens and "
      f"{self._max_new_tokens} new ones"
    )

  def _blank(self, bucket: Bucket) -> Example:
    """Blank pictures that fill a bucket, and one token after them."""
    image_id = np.append(np.zeros(bucket.num_image_tokens, np.int32), np.int32(-1))
    tokens, axes = np.zeros_like(image_id), self._blank_example.positions.shape[1:]
    images = jax.tree.map(lambda leaf: leaf[:0], self._blank_example.images)
    return Example(tokens, image_id, np.zeros((len(tokens), *axes), np.int32), images)


def _lengths(buckets: Sequence[int], longest: int) -> tuple[int, ...]:
  """The buckets below the longest length, doublings of the last of them, and the longest."""
  lengths = [bucket for bucket in buckets if bucket < longest]
  while lengths and 2 * lengths[-1] < longest:
    lengths.append(2 * lengths[-1])
  return (*lengths, longest)


def _padded(images: Images, bucket: Bucket) -> Images:
  def pad(leaf: np.ndarray | None, length: int, value: int = 0) -> np.ndarray | None:
    if leaf is None or len(leaf) == length:
      return leaf
    return np.pad(leaf, [(0, length - len(leaf)), *[(0, 0)] * (leaf.ndim - 1)], constant_values=value)

  return Images(
    pixels=pad(images.pixels, bucket.num_tiles),
    coordinates=pad(images.coordinates, bucket.num_tiles, -1),
    pack_index=pad(images.pack_index, bucket.num_image_tokens),
    pack_weight=pad(images.pack_weight, bucket.num_image_tokens),
  )
