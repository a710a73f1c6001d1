"""Examples from token ids and pixels, for all families."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from himap_jax.errors import UserError
from himap_jax.families.family import View
from himap_jax.families.prompts import IMAGE_TAG
from himap_jax.inputs import Example, Images

MAX_ASPECT_RATIO = 200
MAX_PIXELS = 178_956_970


def check_not_empty(width: int, height: int) -> None:
  """Raises `UserError` for a picture without pixels."""
  if not width or not height:
    raise UserError(f"the picture is empty: it has {width} x {height} pixels")


def check_aspect_ratio(width: int, height: int) -> None:
  """Raises `UserError` for a strip that would exhaust memory when it is resized or padded, or a picture without pixels."""
  check_not_empty(width, height)
  if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
    raise UserError(
      f"the picture has {width} x {height} pixels; one side may be at most {MAX_ASPECT_RATIO} times the other"
    )


def expand(
  ids: Sequence[int],
  image_token_id: int,
  counts: Sequence[int],
  images: Images,
  *,
  runs: Sequence[int] | None = None,
) -> Example:
  """The example of a prompt in which `image_token_id` stands once for each run of image tokens.

  Args:
    counts: image tokens of a run of each picture.
    runs: of each picture; one if absent.

  Raises:
    UserError: the token stands another number of times, or no text follows it.
  """
  ids = np.asarray(ids, np.int32)
  is_image = ids == image_token_id
  pictures = np.repeat(np.arange(len(counts)), 1 if runs is None else runs)
  if is_image.sum() != len(pictures):
    raise UserError(
      f"the tokenizer turns {len(pictures)} {IMAGE_TAG} into {is_image.sum()} image tokens (id {image_token_id}); "
      "the checkpoint's tokenizer and config.json disagree"
    )
  if is_image[-1:].any():
    raise UserError(f"a prompt needs text after {IMAGE_TAG}: its attention decides which image tokens are kept")
  repeats = np.ones(len(ids), int)
  repeats[is_image] = np.asarray(counts, int)[pictures]
  image_id = np.full(len(ids), -1, np.int32)
  image_id[is_image] = pictures
  tokens = np.repeat(ids, repeats)
  return Example(tokens, np.repeat(image_id, repeats), np.arange(len(tokens), dtype=np.int32), images)


def expand_across(ids: Sequence[int], image_token_id: int, count: int, images: Images, num_pictures: int) -> Example:
  """The example of a prompt whose pictures are read by cross-attention: each has `count` image tokens.

  These follow the `image_token_id` of their picture, which is text here, and have its position. Errors as in `expand`.
  """
  example = expand(ids, image_token_id, [1 + count] * num_pictures, images)
  is_first = (example.image_id >= 0) & (np.diff(example.image_id, prepend=-1) != 0)
  image_id = np.where(is_first, -1, example.image_id).astype(np.int32)
  return dataclasses.replace(example, image_id=image_id, positions=positions_across(image_id))


def positions_across(image_id: Int[np.ndarray, "S"]) -> Int[np.ndarray, "S"]:
  """Rotary positions that count text alone: of image tokens, that of the text before them."""
  return (np.cumsum(image_id < 0) - 1).astype(np.int32)


def blank(images: Images, *axes: int) -> Example:
  """A prompt of one token; `images` holds no tiles, and positions have these axes."""
  one = np.zeros(1, np.int32)
  return Example(one, one - 1, np.zeros((1, *axes), np.int32), images)


def refuse_limit(max_image_tokens: int | None, num_image_tokens: int) -> None:
  """Raises `UserError` if a limit is given for a model whose pictures all have equally many image tokens."""
  if max_image_tokens is not None:
    raise UserError(
      f"this model makes {num_image_tokens} image tokens of every picture; --max_image_tokens has no effect"
    )


def pixels_of(image_processor: Any, images: Sequence[Image.Image]) -> list[Float[np.ndarray, "3 h w"]]:
  """The pictures as an image processor of transformers makes them."""
  return [np.asarray(image_processor(x, return_tensors="np")["pixel_values"][0], np.float32) for x in images]


def tiles_of(image_processor: Any, images: Sequence[Image.Image], blank: Example) -> Float[np.ndarray, "P 3 h w"]:
  """The pictures in one array, which has the shape of the tiles of `blank` if there are none."""
  return np.concatenate([blank.images.pixels, *(pixels[None] for pixels in pixels_of(image_processor, images))])


def picture_of(image_processor: Any, pixels: Float[np.ndarray, "3 h w"], height: int, width: int) -> Image.Image:
  """The top left `height` × `width` of a preprocessed picture, with the normalisation undone."""
  mean, std = (
    np.asarray(values, np.float32)[:, None, None] for values in (image_processor.image_mean, image_processor.image_std)
  )
  shown = np.clip((pixels * std + mean) * 255, 0, 255).round().astype(np.uint8)
  return Image.fromarray(shown[:, :height, :width].transpose(1, 2, 0))


def views_of_patches(image_processor: Any, example: Example, grid: tuple[int, int], patch_size: int) -> list[View]:
  """The views of pictures whose patches are their image tokens; raises `UserError` if they are not."""
  rows, columns = grid
  if example.num_image_tokens != len(example.images.pixels) * rows * columns:
    raise UserError(
      f"this model's {example.num_image_tokens // example.num_images} image tokens do not form its grid of {rows} x "
      f"{columns} patches"
    )
  numbers = np.arange(example.num_image_tokens).reshape(-1, rows, columns)
  size = rows * patch_size, columns * patch_size
  return [
    View(picture_of(image_processor, pixels, *size), own)
    for pixels, own in zip(example.images.pixels, numbers, strict=True)
  ]


def places_in(views: Sequence[View], num_image_tokens: int) -> Int[np.ndarray, "N 4"]:
  """The places of image tokens in pictures of one tile and one view each."""
  places = np.full((num_image_tokens, 4), -1)
  for number, view in enumerate(views):
    places[view.tokens.ravel()] = [(number, 0, row, column) for row, column in np.ndindex(view.tokens.shape)]
  return places
