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
  ids: Sequence[int], image_token_id: int, num_image_tokens: int, pixels: Float[np.ndarray, "P 3 h w"]
) -> Example:
  """The example of a prompt in which `image_token_id` stands once for each picture of `num_image_tokens` tokens.

  Raises:
    UserError: the token stands another number of times, or no text follows it.
  """
  ids = np.asarray(ids, np.int32)
  is_image = ids == image_token_id
  if is_image.sum() != len(pixels):
    raise UserError(
      f"the tokenizer turns {len(pixels)} {IMAGE_TAG} into {is_image.sum()} image tokens (id {image_token_id}); "
      "the checkpoint's tokenizer and config.json disagree"
    )
  if is_image[-1]:
    raise UserError(f"a prompt needs text after {IMAGE_TAG}: its attention decides which image tokens are kept")
  repeats = np.where(is_image, num_image_tokens, 1)
  image_id = np.where(is_image, is_image.cumsum() - 1, -1).astype(np.int32)
  tokens = np.repeat(ids, repeats)
  return Example(tokens, np.repeat(image_id, repeats), np.arange(len(tokens), dtype=np.int32), pixels)


def check_images(text: str, num_pictures: int) -> None:
  """Raises `UserError` unless a prompt has one `<image>` for every picture."""
  count = text.count(IMAGE_TAG)
  if count != num_pictures:
    pictures = "1 picture" if num_pictures == 1 else f"{num_pictures} pictures"
    raise UserError(f"a prompt needs one {IMAGE_TAG} for each picture, but this one has {count} for {pictures}")


def fill(template: str, question: str, num_pictures: int) -> str:
  """Puts a question into a template whose `<image>`, with the line break after it, is repeated for every picture.

  `<image>` in the question replaces those of the template.
  """
  tag = IMAGE_TAG + "\n" if IMAGE_TAG + "\n" in template else IMAGE_TAG
  template = template.replace(tag, "" if IMAGE_TAG in question else tag * num_pictures)
  return template.replace("{question}", question)


def literal_template(template: str, *names: str) -> str:
  """A template given as text, with `\\n` for line breaks; raises `UserError`, which lists `names`, if it is unusable."""
  if template.count(IMAGE_TAG) != 1 or template.count("{question}") != 1:
    raise UserError(
      f"--prompt_template must be {', '.join(names)}, or a text with one {IMAGE_TAG} and one {{question}}, "
      f"not {template!r}"
    )
  return template.replace("\\n", "\n")


def pixels_of(image_processor: Any, images: Sequence[Image.Image]) -> Float[np.ndarray, "P 3 h w"]:
  """The pictures as an image processor of transformers makes them."""
  return np.stack([np.asarray(image_processor(x, return_tensors="np")["pixel_values"][0], np.float32) for x in images])


def pictures_of(
  image_processor: Any, pixels: Float[np.ndarray, "P 3 h w"], height: int, width: int
) -> list[Image.Image]:
  """The top left `height` × `width` of preprocessed pictures, with the normalisation undone."""
  mean, std = (
    np.asarray(values, np.float32)[:, None, None] for values in (image_processor.image_mean, image_processor.image_std)
  )
  shown = np.clip((pixels * std + mean) * 255, 0, 255).round().astype(np.uint8)
  return [Image.fromarray(picture[:, :height, :width].transpose(1, 2, 0)) for picture in shown]
