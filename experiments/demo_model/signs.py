"""Signs with numbers and short words, in typefaces of Debian's packages, of which tests have some of their own."""

import functools
import pathlib
import re
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from experiments.demo_model.packages import PACKAGES, fetch

WORDS = (
  "bus car cat cup dog egg fan fox hat hen ink jam key leg map net oil pen pig red sun tea top van yes zoo "
  "ball bell bird book cake door fish hand home king lamp moon open rain road shop snow star stop tree west wood"
).split()
CHARACTERS = tuple("0123456789abcdefghijklmnopqrstuvwxyz")
TILT = 5  # degrees
TYPEFACES = ("liberation", "comic_neue", "lato")  # packages
TEST_FACES = (
  "LiberationSans-BoldItalic LiberationSerif-Bold LiberationMono-Italic LiberationSansNarrow-Regular "
  "ComicNeue-BoldItalic Lato-Semibold Lato-HeavyItalic"
).split()


class Sign(NamedTuple):
  """A picture of a sign; for every pixel the code of its character, or 0; how many pixels a digit is high."""

  pixels: Image.Image
  writing: Image.Image
  digit_height: float


def faces(cache_dir: pathlib.Path, split: str) -> list[pathlib.Path]:
  """The files of a split's typefaces, by name."""
  files = [path for name in TYPEFACES for path in fetch(PACKAGES[name], cache_dir).rglob("*.[ot]tf")]
  wanted = [path for path in files if (path.stem in TEST_FACES) == (split == "test")]
  return sorted(
    (path for path in wanted if not re.search("Thin|Hairline|Light", path.stem)), key=lambda path: path.stem
  )


def draw(rng: np.random.Generator, face: pathlib.Path, text: str) -> Sign:
  """A pale plate with a frame and dark writing, or a dark one with pale writing; tilted by up to `TILT` degrees."""
  font = _font(face)
  left, top, right, bottom = font.getbbox(text)
  _, digit_top, _, digit_bottom = font.getbbox("0")
  height = digit_bottom - digit_top
  margin = round(rng.uniform(0.3, 0.6) * height)
  pale, dark = rng.uniform(205, 256, 3).astype(int), rng.uniform(0, 80, 3).astype(int)
  plate, ink = (pale, dark) if rng.random() < 0.75 else (dark, pale)
  size = right - left + 2 * margin, max(bottom - top, height) + 2 * margin
  pixels, writing = Image.new("RGBA", size), Image.new("L", size)
  canvas, codes = ImageDraw.Draw(pixels), ImageDraw.Draw(writing)
  frame = (0, 0, size[0] - 1, size[1] - 1)
  canvas.rounded_rectangle(frame, margin // 2, fill=(*plate, 255), outline=(*ink, 255), width=max(1, height // 12))
  x, y = margin - left, (size[1] - bottom - top) / 2
  canvas.text((x, y), text, font=font, fill=(*ink, 255))
  for place, character in enumerate(text):
    start, end = (x + font.getlength(text[:length]) for length in (place, place + 1))
    codes.rectangle((start, margin, end - 1, size[1] - margin), fill=ord(character))
  angle = rng.uniform(-TILT, TILT)
  pixels = pixels.rotate(angle, Image.Resampling.BICUBIC, expand=True)
  return Sign(pixels, writing.rotate(angle, Image.Resampling.NEAREST, expand=True), height)


@functools.cache
def _font(face: pathlib.Path) -> ImageFont.FreeTypeFont:
  return ImageFont.truetype(str(face), 72)
