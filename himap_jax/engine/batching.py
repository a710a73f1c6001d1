"""Batches of static shape; no other module decides shapes.

Axes: B rows, S slots, P pictures of a row.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from himap_jax.errors import UserError
from himap_jax.inputs import IMAGE, PADDING, TEXT, Example, Inputs, Layout
from himap_jax.model.config import ModelConfig

DEFAULT_BUCKETS = (64, 128, 256, 512, 1024, 2048)


class Bucket(NamedTuple):
  """The shape of a batch besides its rows: pictures of every row, and slots for its text."""

  num_pictures: int
  num_text_slots: int


class Batcher:
  """Packs prepared prompts into batches; rows of a batch have equally many pictures.

  Attributes:
    num_image_tokens: of one picture.
    buckets: all that a batch can have, ascending; a row's is the first that holds it.
  """

  def __init__(
    self,
    config: ModelConfig,
    image_shape: tuple[int, int],
    *,
    buckets: Sequence[int] = DEFAULT_BUCKETS,
    pictures: Collection[int] = (1,),
    max_new_tokens: int = 0,
  ):
    """Checks the buckets against the model.

    Args:
      image_shape: `(height, width)` of preprocessed images, in pixels.
      buckets: padded text lengths, ascending; the longest that fits the model's context is added.
      pictures: numbers of pictures that rows may have; those that the context does not hold are left out.
      max_new_tokens: tokens to leave room for in the context.

    Raises:
      UserError: the buckets are invalid, or the context is too small for any of the numbers of pictures.
    """
    self._image_shape = image_shape
    self.num_image_tokens = config.num_image_tokens(*image_shape)
    self._context, self._max_new_tokens = config.text.max_position_embeddings, max_new_tokens
    if not buckets or any(b < 1 for b in buckets) or sorted(set(buckets)) != list(buckets):
      raise UserError(f"prompt buckets must be positive and ascending, not {','.join(map(str, buckets))}")
    self.buckets = tuple(
      Bucket(count, length)
      for count in sorted(set(pictures))
      for longest in [self._longest_text(count)]
      for length in (*(bucket for bucket in buckets if bucket < longest), longest)
      if longest > 0
    )
    if not self.buckets:
      raise UserError(self._too_many(min(pictures)))

  @property
  def most_image_tokens(self) -> int:
    """Image tokens of a row with the most pictures."""
    return self.buckets[-1].num_pictures * self.num_image_tokens

  def bucket(self, example: Example) -> Bucket:
    """The smallest bucket that holds an example; raises `UserError` if the prompt exceeds the context."""
    count, length = example.num_pictures, example.num_text_tokens
    longest = self._longest_text(count)
    if longest < 1:
      raise UserError(self._too_many(count))
    fitting = [bucket for bucket in self.buckets if bucket.num_pictures == count and length <= bucket.num_text_slots]
    if not fitting:
      raise UserError(
        f"the prompt has {length} text tokens; with {example.num_image_tokens} image tokens the model's context leaves "
        f"room for {longest}"
      )
    return fitting[0]

  def pack(self, examples: Sequence[Example], *, bucket: Bucket, batch_size: int) -> Inputs:
    """Packs examples into arrays whose shape depends only on `bucket` and `batch_size`.

    Missing rows repeat the last example, or are blank if there is none.
    """
    filler = examples[-1] if examples else self._blank(bucket.num_pictures)
    rows = [*examples, *[filler] * (batch_size - len(examples))]
    num_image_tokens = bucket.num_pictures * self.num_image_tokens
    shape = (batch_size, bucket.num_text_slots + num_image_tokens)
    tokens, positions, image_id = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    kind = np.full(shape, PADDING, np.int32)
    for row, example in enumerate(rows):
      used = slice(len(example.tokens))
      tokens[row, used], positions[row, used] = example.tokens, example.positions
      image_id[row, used] = example.image_id
      kind[row, used] = np.where(example.image_id >= 0, IMAGE, TEXT)
    return Inputs(
      tokens=tokens,
      layout=Layout.of_rows(kind, image_id, num_image_tokens),
      positions=positions,
      pixel_values=np.stack([example.pixel_values for example in rows]),
    )

  def _longest_text(self, num_pictures: int) -> int:
    """Text tokens for which the context has room; below one if there is none."""
    return self._context - num_pictures * self.num_image_tokens - self._max_new_tokens

  def _too_many(self, num_pictures: int) -> str:
    images = "an image" if num_pictures == 1 else f"{num_pictures} images"
    return (
      f"the model's context of {self._context} tokens does not hold {images} of {self.num_image_tokens} tokens and "
      f"{self._max_new_tokens} new ones"
    )

  def _blank(self, num_pictures: int) -> Example:
    """Blank pictures and one token after them."""
    image_id = np.repeat(np.arange(num_pictures + 1, dtype=np.int32), self.num_image_tokens)
    image_id = image_id[: num_pictures * self.num_image_tokens + 1]
    image_id[-1] = -1
    slots = np.arange(len(image_id), dtype=np.int32)
    pixels = np.zeros((num_pictures, 3, *self._image_shape), np.float32)
    return Example(np.zeros_like(slots), image_id, slots, pixels)
