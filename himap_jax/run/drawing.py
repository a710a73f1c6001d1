"""Pictures of the image patches that survive each pruning stage."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageDraw

from himap_jax.families.family import View

MARGIN, CAPTION = 8, 16


def fade(picture: Image.Image, kept: Bool[np.ndarray, "rows columns"]) -> Image.Image:
  """Fades every cell of a picture that is not kept."""
  cells = Image.fromarray(kept.astype(np.uint8) * 255).resize(picture.size, Image.Resampling.NEAREST)
  faded = Image.blend(picture, Image.new("RGB", picture.size, "white"), 0.85)
  return Image.composite(picture, faded, cells)


def draw_kept(views: Sequence[View], kept: Sequence[Sequence[int]]) -> Image.Image:
  """Draws each view of a row's pictures and, beside it, what every stage keeps of it."""
  width, height = (max(view.picture.size[axis] for view in views) for axis in (0, 1))
  across, down = width + MARGIN, height + CAPTION + MARGIN
  sheet = Image.new("RGB", ((len(kept) + 1) * across + MARGIN, len(views) * down + MARGIN), "white")
  draw = ImageDraw.Draw(sheet)
  for number, view in enumerate(views):
    panels = [(f"{(view.tokens >= 0).sum()} image tokens", view.picture)]
    for stage, indices in enumerate(kept, start=1):
      own = np.isin(view.tokens, list(indices))
      panels.append((f"stage {stage}: {own.sum()} kept", fade(view.picture, own)))
    for column, (caption, panel) in enumerate(panels):
      left, top = MARGIN + column * across, number * down
      draw.text((left, top + MARGIN // 2), caption, fill="black")
      sheet.paste(panel, (left, top + MARGIN + CAPTION))
  return sheet
