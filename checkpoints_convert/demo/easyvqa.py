"""Questions and pictures of easy-VQA (package easy-vqa 1.0, MIT): one shape per picture, 13 possible answers."""

import json
from pathlib import Path
from typing import NamedTuple

from checkpoints_convert.demo import packages

SPLITS = ("train", "test")


class Example(NamedTuple):
  """A question about a picture.

  Attributes:
    image: PNG file, 64×64.
    answer: one of 13 words.
    id: `<split>-<position in the package's list>`, unique and stable.
  """

  image: Path
  question: str
  answer: str
  id: str


def load(cache_dir: Path, split: str) -> list[Example]:
  """All questions of a split in the package's order: 38,575 of `train`, 9,673 of `test`.

  `packages.fetch` keeps the packages in `cache_dir`. Raises `ValueError` for an unknown split.
  """
  if split not in SPLITS:
    raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
  folder = packages.fetch(cache_dir) / "easy_vqa" / "data" / split
  rows = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
  return [
    Example(folder / "images" / f"{image}.png", question, answer, f"{split}-{index:05d}")
    for index, (question, answer, image) in enumerate(rows)
  ]
