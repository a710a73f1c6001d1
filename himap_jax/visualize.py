"""A picture of which image patches survive each pruning stage."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

MARGIN, CAPTION = 8, 16


def draw_kept(picture: Image.Image, kept: Sequence[Sequence[int]], grid: tuple[int, int]) -> Image.Image:
  """Draws the picture and, beside it, what is left of it after each stage.

  Args:
    picture: the picture as the model saw it.
    kept: for each stage the indices of the kept image tokens, row by row over the grid.
    grid: (rows, columns) of image tokens.

  Raises:
    ValueError: the image tokens are not such a grid, so they have no place in the picture.
  """
  rows, columns = grid
  if any(not 0 <= index < rows * columns for stage in kept for index in stage):
    raise ValueError(f"a kept image token is outside the {rows} × {columns} grid of patches")
  panels = [(f"{rows * columns} image tokens", picture)]
  for number, stage in enumerate(kept, start=1):
    mask = np.zeros(rows * columns, np.uint8)
    mask[list(stage)] = 255
    patches = Image.fromarray(mask.reshape(rows, columns)).resize(picture.size, Image.Resampling.NEAREST)
    faded = Image.blend(picture, Image.new("RGB", picture.size, "white"), 0.85)
    panels.append((f"stage {number}: {len(stage)} kept", Image.composite(picture, faded, patches)))
  width, height = picture.size
  sheet = Image.new("RGB", (len(panels) * (width + MARGIN) + MARGIN, height + CAPTION + 2 * MARGIN), "white")
  draw = ImageDraw.Draw(sheet)
  for index, (caption, panel) in enumerate(panels):
    left = MARGIN + index * (width + MARGIN)
    draw.text((left, MARGIN // 2), caption, fill="black")
    sheet.paste(panel, (left, MARGIN + CAPTION))
  return sheet
