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


def draw_kept(picture: Image.Image, kept: Sequence[Sequence[int]], grid: tuple[int, int]) -> Image.Image:
  """Draws the picture and, beside it, what each stage keeps of it, as indices over a (rows, columns) grid."""
  rows, columns = grid
  panels = [(f"{rows * columns} image tokens", picture)]
  panels += [(f"stage {n}: {len(stage)} kept", fade(picture, stage, grid)) for n, stage in enumerate(kept, start=1)]
  width, height = picture.size
  sheet = Image.new("RGB", (len(panels) * (width + MARGIN) + MARGIN, height + CAPTION + 2 * MARGIN), "white")
  draw = ImageDraw.Draw(sheet)
  for index, (caption, panel) in enumerate(panels):
    left = MARGIN + index * (width + MARGIN)
    draw.text((left, MARGIN // 2), caption, fill="black")
    sheet.paste(panel, (left, MARGIN + CAPTION))
  return sheet
