"""Pictures as a base and a grid of tiles at the best of several resolutions: LLaVA-NeXT's and LLaVA-OneVision's AnyRes.

The numbers are those of `pack_image_features` and `unpad_image` in transformers' models, which follow the authors'.
Axes: N image tokens, taps connector outputs that a token is made of, R and C rows and columns of image tokens.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from himap_jax.errors import UserError
from himap_jax.families.examples import picture_of
from himap_jax.families.family import View
from himap_jax.model.config import VisionConfig

# `[height, width]` in pixels of a picture that is cut into tiles; a list, as transformers wants it.
Resolution = list[int]

TAPS = 4
SHRINK_ABOVE = 1.1


class Tile(NamedTuple):
  """A square tile: its side, that of its patches, both in pixels, and the number of patches along its side."""

  side: int
  patch: int

  @property
  def patches(self) -> int:
    return self.side // self.patch


class Tiling(NamedTuple):
  """The tiles of a picture and its grid of image tokens, whose rows each end with a newline; lengths are in patches.

  Attributes:
    patches: along a tile's side.
    rows, columns: of tiles, besides the base.
    top, left: padding before the picture.
    height, width: of the picture, without padding.
    grid: rows and columns of image tokens, without newlines: height and width, unless these are shrunk.
  """

  patches: int
  rows: int
  columns: int
  top: int
  left: int
  height: int
  width: int
  grid: tuple[int, int]

  @property
  def num_tiles(self) -> int:
    return 1 + self.rows * self.columns

  @property
  def num_tokens(self) -> int:
    return self.patches**2 + self.grid[0] * (self.grid[1] + 1)


def base_alone(tile: Tile) -> Tiling:
  """The base and one newline."""
  return Tiling(tile.patches, rows=0, columns=0, top=0, left=0, height=1, width=0, grid=(1, 0))


def tiling(size: tuple[int, int], resolutions: Sequence[Resolution], tile: Tile, most_tiles: int | None) -> Tiling:
  """The tiling of a picture of `(width, height)` pixels.

  Args:
    resolutions: those to choose from.
    most_tiles: a grid of clearly more image tokens than so many tiles have is shrunk to as many; None for any number.
  """
  from transformers.image_processing_utils import select_best_resolution  # slow to import

  width, height = size
  best = select_best_resolution((height, width), list(resolutions))
  rows, columns = (length // tile.side for length in best)
  tall, wide = rows * tile.patches, columns * tile.patches
  top = left = 0
  if width / height > wide / tall:
    top = (tall - int(round(height * (wide / width), 7))) // 2
  else:
    left = (wide - int(round(width * (tall / height), 7))) // 2
  grid = own = tall - 2 * top, wide - 2 * left
  if most_tiles is not None:
    ratio = math.sqrt(math.prod(own) / (most_tiles * tile.patches**2))
    if ratio > SHRINK_ABOVE:
      grid = tuple(int(length // ratio) for length in own)
  return Tiling(tile.patches, rows, columns, top, left, *own, grid)


def most_tokens(resolution: Resolution, tile: Tile, most_tiles: int | None) -> int:
  """Image tokens that no picture exceeds at a resolution."""
  rows, columns = (length // tile.side * tile.patches for length in resolution)
  cells = rows * columns
  if most_tiles is not None:
    cells = min(cells, math.floor(SHRINK_ABOVE**2 * most_tiles * tile.patches**2))
  return tile.patches**2 + cells + rows


def check_resolutions(found: Any, tile: Tile, where: str) -> None:
  """Raises `UserError` unless a checkpoint's `image_grid_pinpoints` are heights and widths of whole tiles."""
  is_list = isinstance(found, list) and bool(found)
  if not is_list or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in found):
    raise UserError(f"{where}: image_grid_pinpoints must be a list of [height, width], not {found!r}")
  for length in (length for pair in found for length in pair):
    if not isinstance(length, int) or length < 1 or length % tile.side:
      raise UserError(
        f"{where}: image_grid_pinpoints holds {length!r}, which is no multiple of the tower's image_size {tile.side}"
      )


def resolutions_within(
  resolutions: Sequence[Resolution], tile: Tile, most_tiles: int | None, max_image_tokens: int | None
) -> list[Resolution]:
  """The resolutions at which no picture has more than `max_image_tokens`, all if that is None.

  Raises:
    UserError: there are none.
  """
  known = [list(own) for own in resolutions]
  sizes = [most_tokens(own, tile, most_tiles) for own in known]
  fitting = [
    own for own, size in zip(known, sizes, strict=True) if max_image_tokens is None or size <= max_image_tokens
  ]
  if not fitting:
    raise UserError(
      f"at most {max_image_tokens} image tokens for a picture are too few: this model's smallest grid has {min(sizes)}"
    )
  return fitting


def pack(own: Tiling) -> tuple[Int[np.ndarray, "N taps"], Float[np.ndarray, "N taps"]]:
  """Indices and weights as in `inputs.Images`, the first output of the picture's base being 0.

  Of a grid that is not shrunk, the first tap has all the weight.
  """
  row, row_weight = _bilinear(own.height, own.grid[0])
  column, column_weight = _bilinear(own.width, own.grid[1])
  row, column = row[:, None, :, None] + own.top, column[None, :, None, :] + own.left
  tile = 1 + row // own.patches * own.columns + column // own.patches
  index = (tile * own.patches + row % own.patches) * own.patches + column % own.patches
  weight = row_weight[:, None, :, None] * column_weight[None, :, None, :]
  index, weight = (x.reshape(*own.grid, TAPS) for x in (index, weight))
  index = np.pad(index, ((0, 0), (0, 1), (0, 0)), constant_values=-1).reshape(-1, TAPS)
  weight = np.pad(weight, ((0, 0), (0, 1), (0, 0)))
  weight[:, -1, 0] = 1
  base = np.arange(own.patches**2)[:, None].repeat(TAPS, axis=1)
  all_first = np.eye(1, TAPS).repeat(len(base), axis=0)
  index, weight = np.concatenate([base, index]), np.concatenate([all_first, weight.reshape(-1, TAPS)])
  return index.astype(np.int32), weight.astype(np.float32)


def _bilinear(source: int, target: int) -> tuple[Int[np.ndarray, "target 2"], Float[np.ndarray, "target 2"]]:
  """Two neighbours and their weights, as torch's `interpolate(mode="bilinear", align_corners=False)` takes them."""
  at = np.maximum((np.arange(target) + 0.5) * (source / max(target, 1)) - 0.5, 0)
  first = np.floor(at).astype(int)
  second = np.minimum(first + 1, source - 1)
  return np.stack([first, second], axis=1), np.stack([1 - (at - first), at - first], axis=1)


def pack_all(tilings: Sequence[Tiling]) -> tuple[Int[np.ndarray, "N taps"], Float[np.ndarray, "N taps"]]:
  """As `pack` for all pictures of a row."""
  index, weight = [np.zeros((0, TAPS), np.int32)], [np.zeros((0, TAPS), np.float32)]
  first = 0
  for own in tilings:
    indices, weights = pack(own)
    index.append(np.where(indices < 0, -1, indices + first).astype(np.int32))
    weight.append(weights)
    first += own.num_tiles * own.patches**2
  return np.concatenate(index), np.concatenate(weight)


def places(tilings: Sequence[Tiling]) -> Int[np.ndarray, "N 4"]:
  """Picture, tile (0 is the base), and row and column in the tile, of every image token.

  A token made of several patches is where the one with most weight is. A newline has the tile before it, and −1.
  """
  found = [np.zeros((0, 4), int)]
  for number, own in enumerate(tilings):
    index, weight = pack(own)
    index = np.take_along_axis(index, weight.argmax(axis=1)[:, None], axis=1)[:, 0]
    before = np.maximum.accumulate(np.where(index < 0, 0, np.arange(len(index))))
    tile, place = index[before] // own.patches**2, index % own.patches**2
    row, column = (np.where(index < 0, -1, x) for x in (place // own.patches, place % own.patches))
    found.append(np.stack([np.full_like(tile, number), tile, row, column], axis=1))
  return np.concatenate(found)


def views(
  image_processor: Any, pixels: Float[np.ndarray, "P 3 h w"], tilings: Sequence[Tiling], vision: VisionConfig
) -> list[View]:
  """Of each picture its base and, if it has tiles, these without padding."""
  found, first_tile, first_token = [], 0, 0
  for own in tilings:
    used = own.patches * vision.patch_size  # of a tile; the tower leaves out the rest
    base, *tiles = pixels[first_tile : first_tile + own.num_tiles, :, :used, :used]
    tokens = first_token + np.arange(own.patches**2).reshape(own.patches, own.patches)
    found.append(View(picture_of(image_processor, base, used, used), tokens))
    if math.prod(own.grid):
      whole = np.stack(tiles).reshape(own.rows, own.columns, 3, used, used).transpose(2, 0, 3, 1, 4)
      whole = whole.reshape(3, own.rows * used, own.columns * used)
      size = own.height * vision.patch_size, own.width * vision.patch_size
      shown = whole[:, own.top * vision.patch_size :, own.left * vision.patch_size :]
      grid = np.arange(own.grid[0] * (own.grid[1] + 1)).reshape(own.grid[0], -1)[:, :-1]
      found.append(View(picture_of(image_processor, shown, *size), first_token + own.patches**2 + grid))
    first_tile, first_token = first_tile + own.num_tiles, first_token + own.num_tokens
  return found


def square(vision: VisionConfig, where: str) -> Tile:
  """The tile of a tower; raises `UserError` if its features are not a square grid of patches."""
  fitting = "default" if vision.has_class_token else "full"
  if vision.select_strategy != fitting:
    raise UserError(
      f"{where}: vision_feature_select_strategy {vision.select_strategy!r} leaves no grid of patches with this tower; "
      f"use {fitting}"
    )
  return Tile(vision.image_size, vision.patch_size)
