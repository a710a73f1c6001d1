"""Pictures of the image patches that survive each pruning stage."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image, ImageDraw

from himap_jax.families.family import View

MARGIN, CAPTION = 8, 16
VEIL = (255, 255, 255, 217)  # 85% white
TINT = 0.45  # opacity
RAMP = np.array([[68, 1, 84], [49, 104, 142], [53, 183, 121], [253, 231, 37]])  # from early to late, as in viridis


def veil(kept: Bool[np.ndarray, "rows columns"]) -> UInt8[np.ndarray, "rows columns 4"]:
  """White over every cell that is not kept, as RGBA of a cell each."""
  return np.where(kept[..., None], 0, np.array(VEIL)).astype(np.uint8)


def colours(count: int) -> UInt8[np.ndarray, "count 3"]:
  """A colour for each number of stages that a patch survives, from none to `count` − 1."""
  places = np.linspace(0, len(RAMP) - 1, count)
  return np.stack([np.interp(places, range(len(RAMP)), channel) for channel in RAMP.T], axis=-1).astype(np.uint8)


def survived(view: View, kept: Sequence[Sequence[int]]) -> Int[np.ndarray, "rows columns"]:
  """How many stages keep each cell's token; −1 for cells without one."""
  stages = sum((np.isin(view.tokens, list(indices)).astype(int) for indices in kept), np.zeros(view.tokens.shape, int))
  return np.where(view.tokens >= 0, stages, -1)


def tint(stages: Int[np.ndarray, "rows columns"], num_stages: int) -> UInt8[np.ndarray, "rows columns 4"]:
  """The colour of the stages that each cell survives, see `survived`, as RGBA of a cell each."""
  painted = np.zeros((*stages.shape, 4), np.uint8)
  painted[..., :3] = colours(num_stages + 1)[np.maximum(stages, 0)]
  painted[..., 3] = np.where(stages >= 0, round(255 * TINT), 0)
  return painted


def fade(picture: Image.Image, kept: Bool[np.ndarray, "rows columns"]) -> Image.Image:
  """Fades every cell of a picture that is not kept."""
  cells = Image.fromarray(veil(kept)).resize(picture.size, Image.Resampling.NEAREST)
  return Image.alpha_composite(picture.convert("RGBA"), cells).convert("RGB")


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
