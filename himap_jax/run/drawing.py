"""Pictures of the image patches that survive each pruning stage."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageDraw

MARGIN, CAPTION = 8, 16


def kept_mask(kept: Sequence[int], grid: tuple[int, int]) -> Bool[np.ndarray, "N"]:
  """Mask of the kept image tokens on a (rows, columns) grid; raises `ValueError` if one is outside."""
  rows, columns = grid
  if any(not 0 <= index < rows * columns for index in kept):
    raise ValueError(f"a kept image token is outside the {rows} × {columns} grid of patches")
  mask = np.zeros(rows * columns, bool)
  mask[list(kept)] = True
  return mask


def fade(picture: Image.Image, kept: Sequence[int], grid: tuple[int, int]) -> Image.Image:
  """Fades every patch that is not kept; see `kept_mask`."""
  mask = kept_mask(kept, grid).astype(np.uint8) * 255
  patches = Image.fromarray(mask.reshape(grid)).resize(picture.size, Image.Resampling.NEAREST)
  faded = Image.blend(picture, Image.new("RGB", picture.size, "white"), 0.85)
  return Image.composite(picture, faded, patches)


def draw_kept(pictures: Sequence[Image.Image], kept: Sequence[Sequence[int]], grid: tuple[int, int]) -> Image.Image:
  """Draws each picture of a row and, beside it, what every stage keeps of it.

  `kept` has indices over the (rows, columns) grids of the pictures, one after the other; see `kept_mask`.
  """
  size, (width, height) = grid[0] * grid[1], pictures[0].size
  across, down = width + MARGIN, height + CAPTION + MARGIN
  sheet = Image.new("RGB", ((len(kept) + 1) * across + MARGIN, len(pictures) * down + MARGIN), "white")
  draw = ImageDraw.Draw(sheet)
  for number, picture in enumerate(pictures):
    panels = [(f"{size} image tokens", picture)]
    for stage, indices in enumerate(kept, start=1):
      own = [index - number * size for index in indices if len(pictures) == 1 or index // size == number]
      panels.append((f"stage {stage}: {len(own)} kept", fade(picture, own, grid)))
    for column, (caption, panel) in enumerate(panels):
      left, top = MARGIN + column * across, number * down
      draw.text((left, top + MARGIN // 2), caption, fill="black")
      sheet.paste(panel, (left, top + MARGIN + CAPTION))
  return sheet
