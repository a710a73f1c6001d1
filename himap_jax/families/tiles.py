"""Pictures cut into square tiles, which enter the tower one by one, and prompts by the tokenizer's chat template.

A picture is a grid of tiles, in reading order, and then the whole picture as one more tile; or that tile alone.

Axes: T tiles, N image tokens of a row.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int, Shaped
from PIL import Image

from himap_jax.errors import UserError
from himap_jax.families.examples import blank, expand, picture_of
from himap_jax.families.family import Question, View
from himap_jax.families.files import ModelFiles
from himap_jax.families.prompts import (
  IMAGE_TAG,
  answer_text,
  chat_prompt,
  fill,
  literal_template,
  number_of_pictures,
  prompt_ids,
)
from himap_jax.inputs import Example, Images, ImageSize
from himap_jax.model.config import ModelConfig

# Rows and columns of tiles of a picture, without the whole picture; 1 × 1 if it is not cut.
Grid = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Tiling:
  """How a family cuts pictures into tiles and writes them in a prompt.

  Attributes:
    side: of a tile, in pixels.
    grid: the grid of a picture of `(width, height)` pixels.
    pixels: its tiles, preprocessed.
    text: what stands for a picture in a prompt, from the image token and the grid, with the image token once for every
      run of image tokens.
  """

  side: int
  grid: Callable[[tuple[int, int]], Grid]
  pixels: Callable[[Image.Image], Float[np.ndarray, "T 3 h w"]]
  text: Callable[[str, Grid], str]


def num_tiles(grid: Grid) -> int:
  """Tiles of a picture, the whole picture included."""
  rows, columns = grid
  return 1 if rows * columns == 1 else rows * columns + 1


def most_tiles(max_image_tokens: int | None, tile_tokens: int, most: int) -> int:
  """The most tiles of a picture, without the whole picture, that make at most so many image tokens.

  Args:
    max_image_tokens: None for no other limit than `most`.
    tile_tokens: image tokens of a tile.

  Raises:
    UserError: one tile makes more.
  """
  if max_image_tokens is None:
    return most
  if max_image_tokens < tile_tokens:
    raise UserError(f"--max_image_tokens={max_image_tokens}: a picture has at least {tile_tokens} image tokens")
  return max(1, min(most, max_image_tokens // tile_tokens - 1))


def check_side(side: int, config: ModelConfig) -> None:
  """Raises `UserError` unless tiles of this side have whole groups of patches."""
  patches, size = side // config.vision.patch_size, config.vision.merge_size
  if patches % size:
    raise UserError(
      f"tiles of {side} pixels have {patches} patches a side, which cannot be grouped {size} by {size}; the "
      "checkpoint's image processor and config.json disagree"
    )


class TiledProcessor:
  """Prepares prompts for one model; see `family.Processor`."""

  image_shape = patch_grid = num_image_tokens = None

  def __init__(self, files: ModelFiles, config: ModelConfig, tiling: Tiling, template: str = "chat"):
    """Checks the sizes and the template: `chat` (the checkpoint's own), or a text with `<image>` and `{question}`.

    Raises:
      UserError: the template is unusable, or the tiles do not fit the tower.
    """
    check_side(tiling.side, config)
    self._files, self._config, self._tiling = files, config, tiling
    self._image_token = files.tokenizer.convert_ids_to_tokens(config.image_token_id)
    self._template = template if template == "chat" else literal_template(template, "chat")
    if template == "chat" and not files.chat_template:
      raise UserError("the checkpoint has no chat template; use a literal --prompt_template")
    self._tile_tokens = config.num_image_tokens(tiling.side, tiling.side)
    self.blank = blank(Images(np.zeros((0, 3, tiling.side, tiling.side), np.float32)))

  def image_size(self, sizes: Sequence[tuple[int, int]]) -> ImageSize:
    count = sum(num_tiles(self._tiling.grid(size)) for size in sizes)
    return ImageSize(count, count * self._tile_tokens)

  def prepare(self, images: Sequence[Image.Image], question: Question) -> Example:
    sizes = tuple(image.size for image in images)
    grids = [self._tiling.grid(size) for size in sizes]
    first, *others = self.prompt(question, len(images)).split(self._image_token)
    if len(others) != len(images):
      raise UserError(
        f"the prompt has {len(others)} {self._image_token} for {number_of_pictures(len(images))}; a question may not hold "
        "it, and the chat template must write one for each picture"
      )
    texts = [self._tiling.text(self._image_token, grid) for grid in grids]
    text = first + "".join(own + after for own, after in zip(texts, others, strict=True))
    ids = prompt_ids(self._files.tokenizer, text)
    runs = [own.count(self._image_token) for own in texts]
    counts = [num_tiles(grid) * self._tile_tokens // own for grid, own in zip(grids, runs, strict=True)]
    pixels = np.concatenate([self.blank.images.pixels, *(self._tiling.pixels(image) for image in images)])
    example = expand(ids, self._config.image_token_id, counts, Images(pixels), runs=runs)
    return dataclasses.replace(example, picture_sizes=sizes)

  def prompt(self, question: Question, num_pictures: int = 1) -> str:
    if self._template != "chat":
      return fill(self._template, question, num_pictures).replace(IMAGE_TAG, self._image_token)
    return chat_prompt(self._files.apply_chat_template, question, num_pictures)

  def decode(self, tokens: Sequence[int]) -> str:
    return answer_text(self._files.tokenizer, tokens)

  def views(self, example: Example) -> list[View]:
    """Every picture as a whole, and then its tiles together."""
    views = []
    for grid, tiles, numbers in self._pictures(example):
      views.append((tiles[-1], numbers[-1]))
      if len(tiles) > 1:
        views.append((_joined(tiles[:-1], grid), _joined(numbers[:-1], grid)))
    processor = self._files.image_processor
    return [View(picture_of(processor, pixels, *pixels.shape[1:]), numbers) for pixels, numbers in views]

  def places(self, example: Example) -> Int[np.ndarray, "N 4"]:
    numbers = [numbers for _, _, numbers in self._pictures(example)]
    places = [
      np.stack([np.full(own.shape, picture), *np.indices(own.shape)], -1).reshape(-1, 4)
      for picture, own in enumerate(numbers)
    ]
    return np.concatenate([np.zeros((0, 4), int), *places])

  def _pictures(self, example: Example) -> list[tuple[Grid, Shaped[np.ndarray, "T 3 h w"], Int[np.ndarray, "T r c"]]]:
    """The grid of each picture, its tiles without what lies beyond the last cells, and their cells' image tokens."""
    side, vision = round(self._tile_tokens**0.5), self._config.vision
    used = side * vision.merge_size * vision.patch_size
    numbers = np.arange(example.num_image_tokens).reshape(-1, side, side)
    pictures, first = [], 0
    for grid in map(self._tiling.grid, example.picture_sizes):
      own = slice(first, first + num_tiles(grid))
      pictures.append((grid, example.images.pixels[own, :, :used, :used], numbers[own]))
      first = own.stop
    return pictures


def _joined(tiles: Shaped[np.ndarray, "T *C h w"], grid: Grid) -> Shaped[np.ndarray, "*C H W"]:
  rows = tiles.reshape(*grid, *tiles.shape[1:])
  return np.concatenate([np.concatenate(list(row), axis=-1) for row in rows], axis=-2)
