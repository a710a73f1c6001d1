"""Pictures of the image patches that survive each pruning stage."""

import os
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image, ImageDraw, PngImagePlugin

from himap_jax.errors import UserError
from himap_jax.families.family import View

MARGIN, CAPTION, SWATCH = 8, 16, 10
VEIL = (255, 255, 255, 217)  # 85% white
TINT = 153  # opacity of colours, of 255
RANKS = np.array([[59, 15, 112], [140, 41, 129], [222, 73, 104], [254, 159, 109], [252, 253, 191]])  # the best first
STAGES = np.array([[68, 1, 84], [49, 104, 142], [53, 183, 121], [253, 231, 37]])  # from early to late, as in viridis

Ranks = Sequence[Sequence[int] | None]


def ramp(colours: Int[np.ndarray, "number 3"], count: int) -> UInt8[np.ndarray, "count 3"]:
  """So many colours, evenly spaced from the first to the last of some."""
  places = np.linspace(0, len(colours) - 1, count)
  return np.stack([np.interp(places, range(len(colours)), one) for one in colours.T], axis=-1).astype(np.uint8)


def veil(kept: Bool[np.ndarray, "rows columns"]) -> UInt8[np.ndarray, "rows columns 4"]:
  """White over every cell that is not kept, as RGBA of a cell each."""
  return np.where(kept[..., None], 0, np.array(VEIL)).astype(np.uint8)


def overlay(
  view: View, kept: Sequence[Sequence[int]], ranks: Ranks, num_stages: int
) -> UInt8[np.ndarray, "rows columns 4"]:
  """What layers after so many stages see of a view, as RGBA of a cell each: white over the other cells.

  Colours are those of the rank of a patch's score in the last of these stages or, if it does not rank, of the number of
  all stages that keep the patch. Nothing is coloured before the first.
  """
  if not num_stages:
    return np.zeros((*view.tokens.shape, 4), np.uint8)
  own, own_ranks = kept[num_stages - 1], ranks[num_stages - 1]
  if own_ranks is None:
    survived = [sum(token in stage for stage in map(set, kept)) for token in own]
    colours = ramp(STAGES, len(kept))[np.array(survived, int) - 1]
  else:
    colours = ramp(RANKS, len(own))[np.array(own_ranks, int)]
  painted = veil(np.isin(view.tokens, list(own)) | (view.tokens < 0))
  for token, colour in zip(own, colours, strict=True):
    painted[view.tokens == token] = (*colour, TINT)
  return painted


def legend(ranks: Ranks) -> list[tuple[tuple[int, ...], str]]:
  """Colours of `overlay` with what they mean."""
  entries = []
  if any(own is not None for own in ranks):
    names = ("highest score", "middle of the kept", "lowest score kept")
    entries += zip(ramp(RANKS, 3).tolist(), names, strict=True)
  if None in ranks:
    names = (*(f"dropped at stage {stage}" for stage in range(2, len(ranks) + 1)), "kept to the end")
    entries += zip(ramp(STAGES, len(ranks)).tolist(), names, strict=True)
  return [(tuple(colour), name) for colour, name in entries]


def paint(picture: Image.Image, cells: UInt8[np.ndarray, "rows columns 4"]) -> Image.Image:
  """Lays colours of cells over a picture."""
  large = Image.fromarray(cells).resize(picture.size, Image.Resampling.NEAREST)
  return Image.alpha_composite(picture.convert("RGBA"), large).convert("RGB")


def fade(picture: Image.Image, kept: Bool[np.ndarray, "rows columns"]) -> Image.Image:
  """Fades every cell of a picture that is not kept."""
  return paint(picture, veil(kept))


def draw_kept(views: Sequence[View], kept: Sequence[Sequence[int]], ranks: Ranks | None = None) -> Image.Image:
  """Draws each view of a row's pictures and, beside it, what every stage keeps of it; coloured if ranks are given."""
  width, height = (max(view.picture.size[axis] for view in views) for axis in (0, 1))
  across, down = width + MARGIN, height + CAPTION + MARGIN
  entries = legend(ranks or ())
  size = (len(kept) + 1) * across + MARGIN, len(views) * down + MARGIN + (CAPTION if entries else 0)
  sheet = Image.new("RGB", size, "white")
  draw = ImageDraw.Draw(sheet)
  for number, view in enumerate(views):
    panels = [(f"{(view.tokens >= 0).sum()} image tokens", view.picture)]
    for stage, indices in enumerate(kept, start=1):
      own = np.isin(view.tokens, list(indices))
      cells = veil(own) if ranks is None else overlay(view, kept, ranks, stage)
      panels.append((f"stage {stage}: {own.sum()} kept", paint(view.picture, cells)))
    for column, (caption, panel) in enumerate(panels):
      left, top = MARGIN + column * across, number * down
      draw.text((left, top + MARGIN // 2), caption, fill="black")
      sheet.paste(panel, (left, top + MARGIN + CAPTION))
  left, top = MARGIN, len(views) * down + MARGIN
  for colour, name in entries:
    draw.rectangle((left, top, left + SWATCH, top + SWATCH), fill=colour)
    draw.text((left + SWATCH + MARGIN // 2, top), name, fill="black")
    left += SWATCH + 2 * MARGIN + int(draw.textlength(name))
  return sheet


def save(picture: Image.Image, path: pathlib.Path, digest: str) -> None:
  """Writes a row's picture as PNG, with the row's digest as its text `digest`; whole even if the process is killed.

  Raises:
    UserError: the file exists and is none that this function wrote.
    OSError: it cannot be written.
  """
  if os.path.lexists(path) and not saved_digest(path):
    raise UserError(f"{path} is no picture of an earlier run; name another directory, or remove the file")
  text = PngImagePlugin.PngInfo()
  text.add_text("digest", digest)
  unfinished = path.with_name(f"{path.name}.partial")
  try:
    picture.save(unfinished, format="PNG", pnginfo=text)
    os.replace(unfinished, path)
  except BaseException:
    unfinished.unlink(missing_ok=True)
    raise


def saved_digest(path: pathlib.Path) -> str:
  """The digest of the row whose picture a file is; empty if there is no such file, or it has no digest."""
  try:
    with PngImagePlugin.PngImageFile(path) as picture:  # its size does not matter, as it would to Image.open
      return picture.info.get("digest", "")
  except (OSError, SyntaxError, ValueError):
    return ""
