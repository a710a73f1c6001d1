"""Questions, and how kinds of things are called in them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from experiments.demo_model.scenes import Scene

PIECES = ("food", "clothing")  # kinds that are counted in pieces
VOWELS = "aeiou"


class Question(NamedTuple):
  """A question about a scene."""

  type: str
  question: str
  answer: str


class Drawn(NamedTuple):
  """A scene, its questions by type in random order, and the size of what they ask for, in image tokens, if known."""

  scene: Scene
  questions: Mapping[str, Sequence[Question]]
  size: float | None = None


def one_of(kind: str) -> str:
  """A kind of thing in the singular: "dog", "piece of food"."""
  return f"piece of {kind}" if kind in PIECES else kind


def with_article(kind: str) -> str:
  """One thing of a kind: "a dog", "an apple"."""
  return f"{'an' if one_of(kind)[0] in VOWELS else 'a'} {one_of(kind)}"


def plural(kind: str) -> str:
  """Several things of a kind: "dogs", "pieces of food"."""
  return f"pieces of {kind}" if kind in PIECES else f"{kind}s"
