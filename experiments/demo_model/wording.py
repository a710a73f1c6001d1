"""Questions, and how kinds of things are called in them."""

from typing import NamedTuple

PIECES = ("food", "clothing")  # kinds that are counted in pieces
VOWELS = "aeiou"


class Question(NamedTuple):
  """A question about a scene."""

  type: str
  question: str
  answer: str


def one_of(kind: str) -> str:
  return f"piece of {kind}" if kind in PIECES else kind


def a(kind: str) -> str:
  return f"{'an' if one_of(kind)[0] in VOWELS else 'a'} {one_of(kind)}"


def plural(kind: str) -> str:
  return f"pieces of {kind}" if kind in PIECES else f"{kind}s"
