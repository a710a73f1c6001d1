"""The picture of kept patches, pixel by pixel."""

import numpy as np
import pytest
from PIL import Image

from himap_jax.families.family import View
from himap_jax.run.drawing import CAPTION, MARGIN, draw_kept, legend

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


def colour_of(panel, picture, index):
  """The colour that was laid over a patch with an opacity of 60%."""
  colours = (patch(panel, index) - 0.4 * patch(np.asarray(picture), index)) / 0.6
  assert np.ptp(colours, axis=(0, 1)).max() < 4
  return colours.mean(axis=(0, 1))


def test_colours_are_those_of_ranks(picture):
  kept, ranks = [[0, 2, 4], [2, 4]], [[2, 0, 1], [1, 0]]
  sheet = draw_kept([view(picture)], kept, ranks)
  sheet = sheet.crop((0, 0, sheet.width, sheet.height - CAPTION))
  whole, first, second = (panel.astype(float) for panel in panels(sheet, picture, 3))
  best, middle, last = (colour for colour, _ in legend(ranks))
  assert [name for _, name in legend(ranks)] == ["highest score", "middle of the kept", "lowest score kept"]
  np.testing.assert_array_equal(whole, picture)
  for panel, expected in ((first, {2: best, 4: middle, 0: last}), (second, {4: best, 2: last})):
    for index in range(GRID[0] * GRID[1]):
      if index in expected:
        np.testing.assert_allclose(colour_of(panel, picture, index), expected[index], atol=3)
      else:
        np.testing.assert_allclose(patch(panel, index), 0.15 * patch(whole, index) + 0.85 * 255, atol=1)


def test_colours_without_ranks_are_those_of_stages(picture):
  kept, ranks = [[0, 2, 4], [2, 4], [4]], [None, [1, 0], None]
  stages = legend([None] * 3)
  assert [name for _, name in stages] == ["dropped at stage 2", "dropped at stage 3", "kept to the end"]
  assert legend(ranks) == [*legend([[0]]), *stages]
  sheet = draw_kept([view(picture)], kept, ranks)
  sheet = sheet.crop((0, 0, sheet.width, sheet.height - CAPTION))
  _, first, _, third = (panel.astype(float) for panel in panels(sheet, picture, 4))
  for index, (colour, _) in zip((0, 2, 4), stages, strict=True):
    np.testing.assert_allclose(colour_of(first, picture, index), colour, atol=3)
  np.testing.assert_allclose(colour_of(third, picture, 4), stages[2][0], atol=3)
