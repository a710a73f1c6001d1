"""Batches of static shape; no other module decides shapes.

Axes: B rows, S slots, N image tokens.
"""

from collections.abc import Sequence

import numpy as np

from himap_jax.errors import UserError
from himap_jax.inputs import IMAGE, PADDING, TEXT, Example, Inputs, Layout
from himap_jax.model.config import ModelConfig

DEFAULT_BUCKETS = (64, 128, 256, 512, 1024, 2048)


class Batcher:
  """Packs prepared prompts into batches; `buckets` are padded text lengths, ascending."""

  def __init__(
    self,
    config: ModelConfig,
    image_shape: tuple[int, int],
    *,
    buckets: Sequence[int] = DEFAULT_BUCKETS,
    max_new_tokens: int = 0,
  ):
    """Checks the buckets against the model.

    Args:
      image_shape: `(height, width)` of preprocessed images, in pixels.
      buckets: padded text lengths; the longest that fits the model's context is added.
      max_new_tokens: tokens to leave room for in the context.

    Raises:
      UserError: the buckets are invalid, or the context is too small for an image.
    """
    self._image_shape = image_shape
    self.num_image_tokens = config.num_image_tokens(*image_shape)
    context = config.text.max_position_embeddings
    longest = context - self.num_image_tokens - max_new_tokens
    if longest < 1:
      raise UserError(
        f"the model's context of {context} tokens does not hold an image of {self.num_image_tokens} tokens and "
        f"{max_new_tokens} new ones"
      )
    if not buckets or any(b < 1 for b in buckets) or sorted(set(buckets)) != list(buckets):
      raise UserError(f"prompt buckets must be positive and ascending, not {','.join(map(str, buckets))}")
    self.buckets = (*(bucket for bucket in buckets if bucket < longest), longest)

  def bucket(self, example: Example) -> int:
    """The smallest bucket that holds an example's text; raises `UserError` if the prompt exceeds the context."""
    fitting = [bucket for bucket in self.buckets if example.num_text_tokens <= bucket]
    if not fitting:
      raise UserError(
        f"the prompt has {example.num_text_tokens} text tokens; with {self.num_image_tokens} image tokens the model's "
        f"context leaves room for {self.buckets[-1]}"
      )
    return fitting[0]

  def pack(self, examples: Sequence[Example], *, bucket: int, batch_size: int) -> Inputs:
    """Packs examples into arrays whose shape depends only on `bucket` and `batch_size`.

    Missing rows repeat the last example, or are blank if there is none.
    """
    filler = examples[-1] if examples else self._blank()
    rows = [*examples, *[filler] * (batch_size - len(examples))]
    shape = (batch_size, bucket + self.num_image_tokens)
    tokens, positions, image_id = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    kind = np.full(shape, PADDING, np.int32)
    for row, example in enumerate(rows):
      used = slice(len(example.tokens))
      tokens[row, used], positions[row, used] = example.tokens, example.positions
      image_id[row, used] = example.image_id
      kind[row, used] = np.where(example.image_id >= 0, IMAGE, TEXT)
    return Inputs(
      tokens=tokens,
      layout=Layout.of_rows(kind, image_id, self.num_image_tokens),
      positions=positions,
      pixel_values=np.stack([example.pixel_values for example in rows]),
    )

  def _blank(self) -> Example:
    """A blank image and one token after it."""
    image_id = np.zeros(self.num_image_tokens + 1, np.int32)
    image_id[-1] = -1
    slots = np.arange(len(image_id), dtype=np.int32)
    return Example(np.zeros_like(slots), image_id, slots, np.zeros((3, *self._image_shape), np.float32))
