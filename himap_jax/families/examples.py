"""Examples from token ids and pixels, for all families."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from himap_jax.errors import UserError
from himap_jax.inputs import Example

IMAGE_TAG = "<image>"


def expand(
  ids: Sequence[int], image_token_id: int, num_image_tokens: int, pixels: Float[np.ndarray, "3 h w"]
) -> Example:
  """The example of a prompt in which `image_token_id` stands once, for the picture's `num_image_tokens` tokens.

  Raises:
    UserError: the token does not stand exactly once, or no text follows it.
  """
  if ids.count(image_token_id) != 1:
    raise UserError(
      f"the tokenizer turns {IMAGE_TAG} into {ids.count(image_token_id)} image tokens (id {image_token_id}); "
      "the checkpoint's tokenizer and config.json disagree"
    )
  start = ids.index(image_token_id)
  if start == len(ids) - 1:
    raise UserError(f"a prompt needs text after {IMAGE_TAG}: its attention decides which image tokens are kept")
  tokens = np.array([*ids[:start], *[image_token_id] * num_image_tokens, *ids[start + 1 :]], np.int32)
  slot = np.arange(len(tokens), dtype=np.int32)
  image_id = np.where((slot >= start) & (slot < start + num_image_tokens), 0, -1).astype(np.int32)
  return Example(tokens, image_id, slot, pixels)


def require_one_image(text: str) -> None:
  """Raises `UserError` unless a prompt has exactly one `<image>`."""
  count = text.count(IMAGE_TAG)
  if count != 1:
    raise UserError(f"a prompt needs exactly one {IMAGE_TAG}, but this one has {count}")


def fill(template: str, question: str) -> str:
  """Puts a question into a template; an `<image>` in the question replaces the template's."""
  if IMAGE_TAG in question:
    template = template.replace(IMAGE_TAG + "\n", "").replace(IMAGE_TAG, "")
  return template.replace("{question}", question)


def literal_template(template: str, *names: str) -> str:
  """A template given as text, with `\\n` for line breaks; raises `UserError`, which lists `names`, if it is unusable."""
  if template.count(IMAGE_TAG) != 1 or template.count("{question}") != 1:
    raise UserError(
      f"--prompt_template must be {', '.join(names)}, or a text with one {IMAGE_TAG} and one {{question}}, "
      f"not {template!r}"
    )
  return template.replace("\\n", "\n")


def pixels_of(image_processor: Any, image: Image.Image) -> Float[np.ndarray, "3 h w"]:
  """The picture as an image processor of transformers makes it."""
  return np.asarray(image_processor(image, return_tensors="np")["pixel_values"][0], np.float32)


def picture_of(image_processor: Any, pixels: Float[np.ndarray, "3 h w"], height: int, width: int) -> Image.Image:
  """The top left `height` × `width` of preprocessed pixels, with the normalisation undone."""
  mean, std = (
    np.asarray(values, np.float32)[:, None, None] for values in (image_processor.image_mean, image_processor.image_std)
  )
  shown = np.clip((pixels * std + mean) * 255, 0, 255).round().astype(np.uint8)
  return Image.fromarray(shown[:, :height, :width].transpose(1, 2, 0))
