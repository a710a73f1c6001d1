"""The picture of kept patches, pixel by pixel."""

import numpy as np
import pytest
from PIL import Image

from himap_jax.families.family import View
from himap_jax.run.drawing import CAPTION, MARGIN, draw_kept

SIDE = 10  # of a patch in pixels
GRID = (2, 3)


@pytest.fixture
def picture():
  pixels = np.random.default_rng(0).integers(0, 200, (GRID[0] * SIDE, GRID[1] * SIDE, 3), dtype=np.uint8)
  return Image.fromarray(pixels)


def view(picture):
  return View(picture, np.arange(6).reshape(GRID))


def panels(sheet, picture, count):
  pixels = np.asarray(sheet)
  top, width, height = MARGIN + CAPTION, *picture.size
  lefts = [MARGIN + index * (width + MARGIN) for index in range(count)]
  assert pixels.shape == (top + height + MARGIN, lefts[-1] + width + MARGIN, 3)
  return [pixels[top : top + height, left : left + width] for left in lefts]


def patch(pixels, index):
  row, column = divmod(index, GRID[1])
  return pixels[row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE]


def test_kept_patches_stay_and_the_others_fade(picture):
  original = np.asarray(picture)
  kept = [[0, 2, 4], [2]]
  whole, *stages = panels(draw_kept([view(picture)], kept), picture, 3)
  np.testing.assert_array_equal(whole, original)
  for panel, stage in zip(stages, kept, strict=True):
    for index in range(GRID[0] * GRID[1]):
      actual, before = patch(panel, index), patch(original, index)
      if index in stage:
        np.testing.assert_array_equal(actual, before)
      else:
        np.testing.assert_allclose(actual, 0.15 * before + 0.85 * 255, atol=1)


def test_captions_count_what_is_kept(picture):
  one, two = (np.asarray(draw_kept([view(picture)], [kept])) for kept in ([0], [0, 1]))
  assert (one[: MARGIN + CAPTION] < 128).any()
  assert not np.array_equal(one[: MARGIN + CAPTION], two[: MARGIN + CAPTION])


def test_no_stages(picture):
  (whole,) = panels(draw_kept([view(picture)], []), picture, 1)
  np.testing.assert_array_equal(whole, picture)
