"""Batches of static shape: the one place where shapes are decided.

Axes: B rows, S slots, N image tokens.
"""

from collections.abc import Sequence

import numpy as np

from himap_jax.errors import UserError
from himap_jax.inputs import IMAGE, PADDING, TEXT, Example, Inputs, Layout
from himap_jax.model.config import ModelConfig

DEFAULT_BUCKETS = (64, 128, 256, 512, 1024, 2048)


class Batcher:
  """Packs prepared prompts of one model into batches.

  Attributes:
    num_image_tokens: N, image tokens of every prompt.
    buckets: padded text lengths, ascending.
  """

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
      config: the model.
      image_shape: `(height, width)` in pixels of every preprocessed image.
      buckets: padded text lengths; the longest text that the model's context allows is added to them.
      max_new_tokens: tokens that must still fit into the context.

    Raises:
      UserError: buckets that cannot be used, or a context too small for an image.
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
    """The smallest bucket that holds an example's text.

    Raises:
      UserError: the prompt is longer than the model's context.
    """
    fitting = [bucket for bucket in self.buckets if example.num_text_tokens <= bucket]
    if not fitting:
      raise UserError(
        f"the prompt has {example.num_text_tokens} text tokens; with {self.num_image_tokens} image tokens the model's "
        f"context leaves room for {self.buckets[-1]}"
      )
    return fitting[0]

  def pack(self, examples: Sequence[Example], *, bucket: int, batch_size: int) -> Inputs:
    """Packs examples into arrays of a shape that depends on `bucket` and `batch_size` alone.

    Missing rows repeat the last example, or are blank where there is none.
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
    """An image, and one token after it."""
    image_id = np.zeros(self.num_image_tokens + 1, np.int32)
    image_id[-1] = -1
    slots = np.arange(len(image_id), dtype=np.int32)
    return Example(np.zeros_like(slots), image_id, slots, np.zeros((3, *self._image_shape), np.float32))
