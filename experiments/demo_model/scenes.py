"""Scenes: cut-outs on a background, determined by the random numbers.

Positions are those of a thing's middle, as shares of the picture's width and height.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from experiments.demo_model import cutouts
from experiments.demo_model.cutouts import KINDS, Cutout

SIDE = 336
MAX_THINGS = 6
TILT = 12  # degrees

# Left, top, right, bottom, as shares of the picture.
Box = tuple[float, float, float, float]


class Thing(NamedTuple):
  """A cut-out in a scene, its box, and whether it is one of the tiny things that a question is about."""

  cutout: Cutout
  box: Box
  is_tiny: bool = False

  @property
  def middle(self) -> tuple[float, float]:
    left, top, right, bottom = self.box
    return (left + right) / 2, (top + bottom) / 2


class Scene(NamedTuple):
  """A picture of `SIDE` pixels and its things.

  Attributes:
    instances: for every pixel the number of its thing, 0 in the background.
    writing: for every pixel the code of the character that is written there, or 0.
  """

  picture: Image.Image
  things: tuple[Thing, ...]
  instances: np.ndarray
  writing: np.ndarray

  def of_kind(self, kind: str) -> list[Thing]:
    return [thing for thing in self.things if thing.cutout.kind == kind]

  def alone(self) -> list[Thing]:
    """Things that are the only ones of their kind."""
    return [thing for thing in self.things if len(self.of_kind(thing.cutout.kind)) == 1]


def compose(rng: np.random.Generator, pictures: Sequence[Cutout]) -> Scene:
  """Draws one to six things of one to five kinds, their sizes and places, and a background."""
  by_kind = {kind: [c for c in pictures if c.kind == kind] for kind in KINDS}
  count = int(rng.integers(1, MAX_THINGS + 1))
  kinds = rng.choice(KINDS, size=min(count, int(rng.integers(1, len(KINDS)))), replace=False)
  chosen = [*kinds, *rng.choice(kinds, size=count - len(kinds))]
  canvas = Canvas(background(rng))
  largest = 0.65 if count == 1 else 0.5 if count <= 3 else 0.42
  for kind in chosen:
    cutout = by_kind[kind][rng.integers(len(by_kind[kind]))]
    pixels = turned(rng, cutout)
    canvas.place(rng, cutout, pixels, rng.uniform(0.65, 1.0) * largest)
  return canvas.scene()


def turned(rng: np.random.Generator, cutout: Cutout) -> Image.Image:
  """A cut-out's pixels, mirrored or not, and tilted by up to `TILT` degrees."""
  pixels = cutouts.read(cutout.path)
  if rng.random() < 0.5:
    pixels = pixels.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  return pixels.rotate(rng.uniform(-TILT, TILT), Image.Resampling.BICUBIC, expand=True)


class Canvas:
  """A scene while things are added to it."""

  def __init__(self, picture: Image.Image):
    self.picture, self.things = picture, []
    self._instances, self._writing = (Image.new("L", (SIDE, SIDE)) for _ in range(2))

  def place(self, rng: np.random.Generator, cutout: Cutout, pixels: Image.Image, size: float) -> Thing:
    """Adds a thing at a random free place; `size` is its longer side, smaller if there is no place for it."""
    while True:
      scale = size * SIDE / max(pixels.size)
      width, height = (max(8, round(side * scale)) for side in pixels.size)
      box = self.free(rng, width / SIDE, height / SIDE)
      if box is not None:
        return self.add(cutout, pixels, box, (width, height))
      size *= 0.85

  def add(self, cutout: Cutout, pixels: Image.Image, box: Box, size: tuple[int, int]) -> Thing:
    """Adds a thing at a box, resized to `size` pixels."""
    pixels = pixels.resize(size, Image.Resampling.LANCZOS)
    corner = round(box[0] * SIDE), round(box[1] * SIDE)
    self.picture.paste(pixels, corner, pixels)
    self.things.append(Thing(cutout, box))
    self._instances.paste(len(self.things), corner, pixels.getchannel("A").point(lambda a: 255 * (a > 128)))
    return self.things[-1]

  def write(self, thing: Thing, writing: Image.Image) -> None:
    """Records the codes of the characters that a thing shows."""
    left, top, right, bottom = (round(side * SIDE) for side in thing.box)
    self._writing.paste(writing.resize((right - left, bottom - top), Image.Resampling.NEAREST), (left, top))

  def free(self, rng: np.random.Generator, width: float, height: float) -> Box | None:
    """A random box of this size apart from all things; None if none is found."""
    for _ in range(40):
      left, top = rng.uniform(0.01, 0.99 - width), rng.uniform(0.01, 0.99 - height)
      box = (left, top, left + width, top + height)
      if not any(overlap(box, thing.box, apart=0.01) for thing in self.things):
        return box
    return None

  def scene(self) -> Scene:
    return Scene(self.picture, tuple(self.things), np.asarray(self._instances), np.asarray(self._writing))


def overlap(a: Box, b: Box, *, apart: float = 0.0) -> bool:
  """Whether two boxes overlap, or are at most `apart` apart both across and down."""
  return a[0] <= b[2] + apart and b[0] <= a[2] + apart and a[1] <= b[3] + apart and b[1] <= a[3] + apart


def background(rng: np.random.Generator) -> Image.Image:
  """A linear gradient between two pale colours, with low-frequency noise."""
  first, second = rng.uniform(150, 255, (2, 3))
  angle = rng.uniform(0, 2 * np.pi)
  y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE - 0.5
  gradient = (np.cos(angle) * x + np.sin(angle) * y) / np.sqrt(2) + 0.5
  noise = Image.fromarray(rng.uniform(0, 255, (8, 8)).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
  colours = first + (second - first) * gradient[..., None] + (np.asarray(noise, np.float32)[..., None] - 127.5) * 0.1
  return Image.fromarray(np.clip(colours, 0, 255).astype(np.uint8))
