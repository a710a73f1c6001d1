"""LLaVA-OneVision on pictures: LLaVA-NeXT's tiles, whose grid of image tokens is shrunk if it is large."""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from himap_jax.errors import UserError
from himap_jax.families import anyres, files, llava, llava_next
from himap_jax.families.family import Family
from himap_jax.inputs import Images
from himap_jax.model.config import ModelConfig

complete = functools.partial(llava.complete, class_name="LlavaOnevisionConfig")


def config(fields: dict[str, Any], where: str) -> ModelConfig:
  """The sizes described by a `config.json`; errors as in `llava_next.config`, or an unknown `vision_aspect_ratio`."""
  own = llava_next.config(fields, where, "LlavaOnevisionConfig")
  most_tiles(complete(fields, where), where)
  return dataclasses.replace(own, num_taps=anyres.TAPS)


def most_tiles(fields: dict[str, Any], where: str) -> int:
  """The number in `anyres_max_9`."""
  found = re.fullmatch(r"anyres_max_([1-9]\d*)", fields["vision_aspect_ratio"])
  if found is None:
    raise UserError(
      f"{where}: vision_aspect_ratio is {fields['vision_aspect_ratio']!r}; supported: anyres_max_ and a number"
    )
  return int(found[1])


def load_processor(directory: pathlib.Path) -> files.ModelFiles:
  """Loads the tokenizer and the image processor; raises `UserError` if that fails."""
  return llava_next.load_files(directory, "LlavaOnevisionImageProcessorPil", complete)


class LlavaOnevisionProcessor(llava_next.LlavaNextProcessor):
  """Prepares prompts for one model; see `family.Processor`.

  A row's only picture is tiled. Of several each is padded to a square, and has a base and a newline alone.
  """

  def __init__(
    self, own: files.ModelFiles, config: ModelConfig, template: str = "chat", max_image_tokens: int | None = None
  ):
    self.most_tiles = most_tiles(dict(own.fields), "config.json")
    super().__init__(own, config, template, max_image_tokens)

  def tilings(self, sizes: Sequence[tuple[int, int]]) -> list[anyres.Tiling]:
    return super().tilings(sizes) if len(sizes) == 1 else [anyres.base_alone(self._tile)] * len(sizes)

  def _images(self, pixels: Float[np.ndarray, "P 3 h w"], tilings: Sequence[anyres.Tiling]) -> Images:
    index, weight = anyres.pack_all(tilings)
    return Images(pixels, pack_index=index, pack_weight=weight)

  def _pixels(self, images: Sequence[Image.Image]) -> Float[np.ndarray, "P 3 h w"]:
    if len(images) > 1:
      for image in images:
        llava.check_square(image)
    return self._tiles_of([list(images)])


FAMILIES = (Family("llava_onevision", config, complete, load_processor, LlavaOnevisionProcessor),)
