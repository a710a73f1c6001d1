"""LLaVA-NeXT: LLaVA on a base and tiles of each picture, and a learned newline after each row of patches."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from himap_jax.errors import UserError
from himap_jax.families import anyres, files, llava
from himap_jax.families.examples import blank, expand
from himap_jax.families.family import Family, Question, View
from himap_jax.inputs import Example, Images, ImageSize
from himap_jax.model.config import ModelConfig

TOWERS = ("clip_vision_model", "siglip_vision_model")

complete = functools.partial(llava.complete, class_name="LlavaNextConfig")


def config(fields: dict[str, Any], where: str, class_name: str = "LlavaNextConfig") -> ModelConfig:
  """The sizes described by a `config.json`, read by a configuration class of transformers.

  Raises:
    UserError: as `llava.config`, or the tower's features or `image_grid_pinpoints` form no grid of tiles.
  """
  own = llava.config(fields, where, class_name, TOWERS)
  full = llava.complete(fields, where, class_name=class_name)
  anyres.check_resolutions(full["image_grid_pinpoints"], anyres.square(own.vision, where), where)
  return dataclasses.replace(own, has_newline=True)


def load_processor(directory: pathlib.Path) -> files.ModelFiles:
  """Loads the tokenizer and the image processor; raises `UserError` if that fails."""
  return load_files(directory, "LlavaNextImageProcessorPil", complete)


def load_files(
  directory: pathlib.Path, image_processor: str, complete: Callable[[dict[str, Any]], dict[str, Any]]
) -> files.ModelFiles:
  """As `files.load`, with complete fields of config.json; its resolutions must be those of the image processor."""
  own = files.load(directory, image_processor)
  own = dataclasses.replace(own, fields=complete(dict(own.fields)))
  found, expected = own.image_processor.image_grid_pinpoints, own.fields["image_grid_pinpoints"]
  if not isinstance(found, list) or sorted(map(str, found)) != sorted(map(str, expected)):
    raise UserError(f"{directory}: config.json and the image processor have different image_grid_pinpoints")
  return own


class LlavaNextProcessor(llava.LlavaPrompts):
  """Prepares prompts for one model; see `family.Processor`."""

  image_shape = patch_grid = num_image_tokens = None
  most_tiles: int | None = None

  def __init__(
    self, own: files.ModelFiles, config: ModelConfig, template: str = "chat", max_image_tokens: int | None = None
  ):
    """Checks the template and the image processor.

    Args:
      template: as for LLaVA.
      max_image_tokens: of a picture; it leaves out the resolutions that can have more.

    Raises:
      UserError: the template is unusable, the image processor's tiles are not the tower's, or every resolution can have
        more tokens.
    """
    super().__init__(own, template)
    self._config, self._image_processor = config, own.image_processor
    self._tile = anyres.Tile(config.vision.image_size, config.vision.patch_size)
    self._resolutions = anyres.resolutions_within(
      own.fields["image_grid_pinpoints"], self._tile, self.most_tiles, max_image_tokens
    )
    self.blank = blank(self._images(np.zeros((0, 3, self._tile.side, self._tile.side), np.float32), []))
    (found,) = self._pixels([Image.new("RGB", (1, 1))])[:1]
    if found.shape != self.blank.images.pixels.shape[1:]:
      raise UserError(
        f"the image processor makes tiles of {found.shape[2]} x {found.shape[1]} pixels, and the tower reads "
        f"{self._tile.side} x {self._tile.side}"
      )

  def image_size(self, sizes: Sequence[tuple[int, int]]) -> ImageSize:
    tilings = self.tilings(sizes)
    return ImageSize(sum(own.num_tiles for own in tilings), sum(own.num_tokens for own in tilings))

  def tilings(self, sizes: Sequence[tuple[int, int]]) -> list[anyres.Tiling]:
    """The tilings of a row's pictures, from their `(width, height)`."""
    return [anyres.tiling(size, self._resolutions, self._tile, self.most_tiles) for size in sizes]

  def prepare(self, images: Sequence[Image.Image], question: Question) -> Example:
    sizes = tuple(image.size for image in images)
    tilings, ids = self.tilings(sizes), self.ids(self.prompt(question, len(images)))
    pixels = self._pixels(images) if images else self.blank.images.pixels
    counts = [own.num_tokens for own in tilings]
    example = expand(ids, self._config.image_token_id, counts, self._images(pixels, tilings))
    return dataclasses.replace(example, picture_sizes=sizes)

  def views(self, example: Example) -> list[View]:
    tilings = self.tilings(example.picture_sizes)
    return anyres.views(self._image_processor, example.images.pixels, tilings, self._config.vision)

  def places(self, example: Example) -> Int[np.ndarray, "N 4"]:
    return anyres.places(self.tilings(example.picture_sizes))

  def _images(self, pixels: Float[np.ndarray, "P 3 h w"], tilings: Sequence[anyres.Tiling]) -> Images:
    index, _ = anyres.pack_all(tilings)
    return Images(pixels, pack_index=index[:, :1])

  def _pixels(self, images: Sequence[Image.Image]) -> Float[np.ndarray, "P 3 h w"]:
    """The tiles of all pictures, as transformers makes them."""
    return np.concatenate([self._tiles_of(image) for image in images])

  def _tiles_of(self, images: Image.Image | list[list[Image.Image]]) -> Float[np.ndarray, "P 3 h w"]:
    tiles = self._image_processor(images, image_grid_pinpoints=self._resolutions, return_tensors="np")["pixel_values"]
    return np.asarray(tiles, np.float32).reshape(-1, *tiles.shape[2:])


FAMILIES = (Family("llava_next", config, complete, load_processor, LlavaNextProcessor),)
