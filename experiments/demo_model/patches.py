"""Words for the patches of training pictures.

The words are the kind, name and colour of the thing in a patch, or "nothing"; whether it is the thing's middle; and its
place in the picture.

Axes: P patches, W words.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image

from experiments.demo_model.cutouts import COLOUR_NAMES, KINDS
from experiments.demo_model.data import Pool
from experiments.demo_model.scenes import Scene

SHAPES = ("circle", "triangle", "rectangle")
PLACES = ("left", "right", "top", "bottom")
PLACE_WEIGHT = 0.7
MIDDLE_RADIUS = 0.06  # as a share of the picture's side
COVERED = 0.3  # a patch shows a thing that covers at least this share of it


def vocabulary(names: Sequence[str]) -> list[str]:
  return list(dict.fromkeys([*PLACES, "nothing", "middle", *KINDS, *COLOUR_NAMES, *SHAPES, "teal", *names]))


def describe(
  instances: np.ndarray, things: Sequence[tuple[Sequence[str], tuple[float, float]]], grid: int, words: Sequence[str]
) -> Float[np.ndarray, "P W"]:
  """The weight of each word of a vocabulary for each patch; `grid` is the number of patches along a side.

  `instances` holds the thing number of every pixel, 0 in the background; `things` are their words and middles.
  """
  column = {word: index for index, word in enumerate(words)}
  labels = np.zeros((grid, grid, len(words)), np.float32)
  y, x = (np.mgrid[0:grid, 0:grid] + 0.5) / grid
  for word, place in zip(PLACES, (1 - 2 * x, 2 * x - 1, 1 - 2 * y, 2 * y - 1), strict=True):
    labels[..., column[word]] = PLACE_WEIGHT * np.maximum(place, 0)
  edges = np.linspace(0, len(instances), grid + 1).round().astype(int)
  masks = (instances == np.arange(1, len(things) + 1)[:, None, None]).astype(np.float32)
  sums = np.add.reduceat(np.add.reduceat(masks, edges[:-1], 1), edges[:-1], 2)
  cover = sums / np.outer(np.diff(edges), np.diff(edges))
  largest = cover.argmax(0)
  shown = cover.max(0) >= COVERED
  labels[..., column["nothing"]] = ~shown
  for number, (own_words, (u, v)) in enumerate(things):
    for word in own_words:
      labels[shown & (largest == number), column[word]] = 1.0
    near = np.exp(-((x - u) ** 2 + (y - v) ** 2) / MIDDLE_RADIUS**2)
    labels[..., column["middle"]] = np.maximum(labels[..., column["middle"]], near)
  return labels.reshape(grid * grid, len(words))


def describe_scene(scene: Scene, grid: int, words: Sequence[str]) -> Float[np.ndarray, "P W"]:
  things = [([word for word in thing.cutout[1:] if word], thing.middle) for thing in scene.things]
  return describe(scene.instances, things, grid, words)


def describe_shape(picture: Image.Image, pool: Pool, grid: int, words: Sequence[str]) -> Float[np.ndarray, "P W"]:
  """Describes an easy-VQA picture, whose one shape differs in colour from the picture's corner."""
  pixels = np.asarray(picture).astype(int)
  shape = np.abs(pixels - pixels[0, 0]).sum(-1) > 30
  y, x = np.nonzero(shape)
  middle = ((x.mean() + 0.5) / len(shape), (y.mean() + 0.5) / len(shape))
  return describe(shape.astype(np.uint8), [([answer for _, answer in pool.open_ended], middle)], grid, words)
