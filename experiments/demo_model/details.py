"""Scenes whose questions need the right image tokens: small things among large ones, signs, and sheets of photographs.

A scene is of one of five kinds, and its questions are of eight types:

| scene | type       | question                                                  | answer         |
|-------|------------|-----------------------------------------------------------|----------------|
| small | tiny       | what kind of thing is the tiny one?                       | a kind         |
|       | next       | what kind of thing is next to the tiny plant?             | a kind         |
| crowd | crowd      | how many tiny animals are there?                          | 1 … 6          |
| sign  | digits     | what number is on the sign?                               | 0 … 99         |
|       | word       | what word is on the sign?                                 | one of `WORDS` |
| sheet | photograph | what kind of thing is in the top left photograph?         | a kind         |
|       | sheet      | how many photographs show a piece of food?                | 0 … 9          |
| board | board      | what does the top left sign say?                          | either         |

The size of what is asked for is known, in image tokens of `PATCH` pixels: the longer side of a small thing, the height
of a digit, on a board its mean, the side of a photograph.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

import numpy as np
from PIL import Image

from experiments.demo_model import scenes, signs
from experiments.demo_model.cutouts import KINDS, Cutout
from experiments.demo_model.scenes import SIDE, Canvas, Scene, Thing
from experiments.demo_model.wording import Drawn, Question, one_of, plural, with_article

PATCH = 14
TYPES = ("tiny", "next", "crowd", "digits", "word", "photograph", "sheet", "board")
SIZES = (1.0, 1.5, 2.0, 3.0, 4.0)  # of small things and of digits on a single sign
NEXT_TO, FURTHER = 0.12, 0.12  # how far from a tiny thing its neighbour is at most, and how much further all others are
MOST = 6  # tiny things in a crowd
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "middle", "right")
GAP = 0.03  # between photographs, as a share of the picture
FILLED = 0.8  # of a photograph by its thing, and of a board's cells by its signs
SIGN = Cutout(None, "sign", None, None)


class Parts(NamedTuple):
  """What scenes are made of: cut-outs by kind, and files of typefaces."""

  cutouts: Mapping[str, Sequence[Cutout]]
  faces: Sequence[pathlib.Path]

  @classmethod
  def of(cls, pictures: Sequence[Cutout], faces: Sequence[pathlib.Path]) -> Self:
    return cls({kind: [cutout for cutout in pictures if cutout.kind == kind] for kind in KINDS}, faces)

  def draw(self, rng: np.random.Generator, kind: str) -> tuple[Cutout, Image.Image]:
    alike = self.cutouts[kind]
    cutout = alike[rng.integers(len(alike))]
    return cutout, scenes.turned(rng, cutout)


def compose(rng: np.random.Generator, parts: Parts, *, size: float | None = None) -> Drawn:
  """Draws a scene and asks about it; `size` sets that of small things and of digits, which is drawn if absent."""
  drawn = float(rng.choice(SIZES))
  make = (_small, _small, _crowd, _sign, _sign, _sheet, board)[rng.integers(7)]
  scene, asked, own_size = make(rng, parts, drawn if size is None else size)
  questions = {type: [own for own in asked if own.type == type] for type in TYPES}
  return Drawn(scene, {type: [own[i] for i in rng.permutation(len(own))] for type, own in questions.items()}, own_size)


Made = tuple[Scene, Sequence[Question], float]


def _small(rng: np.random.Generator, parts: Parts, size: float) -> Made:
  """A tiny thing, and two to four large things of other kinds, of which one is close to it."""
  canvas, questions = _tiny_and_next(rng, parts, rng.choice(KINDS, size=int(rng.integers(3, 6)), replace=False), size)
  return canvas.scene(), questions, size


def _tiny_and_next(
  rng: np.random.Generator, parts: Parts, kinds: Sequence[str], size: float
) -> tuple[Canvas, list[Question]]:
  """A tiny thing of the first kind, large ones of the others, and what they are asked about."""
  tiny, *large = map(str, kinds)
  while True:
    canvas = Canvas(scenes.background(rng))
    thing = _add_tiny_thing(rng, canvas, parts, tiny, size)
    others = _add_large_things(rng, canvas, parts, large)
    near, *far = sorted((_distance(thing, other), other.cutout.kind) for other in others)
    if near[0] <= NEXT_TO and all(distance - near[0] >= FURTHER for distance, _ in far):
      break
  return canvas, [
    Question("tiny", "what kind of thing is the tiny one?", tiny),
    Question("next", f"what kind of thing is next to the tiny {one_of(tiny)}?", near[1]),
  ]


def _crowd(rng: np.random.Generator, parts: Parts, size: float) -> Made:
  """One to six tiny things of a kind, and one or two large things of other kinds."""
  tiny, *large = map(str, rng.choice(KINDS, size=int(rng.integers(2, 4)), replace=False))
  canvas = Canvas(scenes.background(rng))
  question = _add_crowd(rng, canvas, parts, tiny, size)
  _add_large_things(rng, canvas, parts, large)
  return canvas.scene(), [question], size


def _add_crowd(rng: np.random.Generator, canvas: Canvas, parts: Parts, kind: str, size: float) -> Question:
  """One to six tiny things of a kind, and how many they are."""
  count = int(rng.integers(1, MOST + 1))
  for _ in range(count):
    _add_tiny_thing(rng, canvas, parts, kind, size)
  return Question("crowd", f"how many tiny {plural(kind)} are there?", str(count))


def _sign(rng: np.random.Generator, parts: Parts, size: float) -> Made:
  """A sign with a number or a word, and one to three large things."""
  canvas, (sign, text) = Canvas(scenes.background(rng)), _written(rng, parts)
  question = _add_sign(rng, canvas, sign, text, size)
  _add_large_things(rng, canvas, parts, rng.choice(KINDS, size=int(rng.integers(1, 4)), replace=False))
  return canvas.scene(), [question], size


def _add_sign(rng: np.random.Generator, canvas: Canvas, sign: signs.Sign, text: str, size: float) -> Question:
  """A sign with digits of a size, and what it says."""
  thing = canvas.place(rng, SIGN, sign.pixels, max(sign.pixels.size) * size * PATCH / sign.digit_height / SIDE)
  canvas.write(thing, sign.writing)
  type, what = ("digits", "number") if text.isdigit() else ("word", "word")
  return Question(type, f"what {what} is on the sign?", text)


def _sheet(rng: np.random.Generator, parts: Parts, size: float) -> Made:
  """Two by two or three by three photographs, each of one thing on its own ground."""
  del size
  along, canvas = int(rng.integers(2, 4)), Canvas(scenes.background(rng))
  side = round((1 / along - GAP) * SIDE)
  asked = []
  for where, (x, y) in _grid(along).items():
    ground = scenes.background(rng).resize((side, side))
    canvas.picture.paste(ground, (round(x * SIDE - side / 2), round(y * SIDE - side / 2)))
    kind = str(rng.choice(KINDS))
    _add_at(canvas, *parts.draw(rng, kind), (x, y), FILLED * side)
    asked.append(Question("photograph", f"what kind of thing is in the {where} photograph?", kind))
  scene = canvas.scene()
  for kind in KINDS:
    asked.append(Question("sheet", f"how many photographs show {with_article(kind)}?", str(len(scene.of_kind(kind)))))
  return scene, asked, side / PATCH


def board(rng: np.random.Generator, parts: Parts, size: float = 0.0) -> Made:
  """Two by two or three by three signs."""
  del size
  along, canvas, heights, asked = int(rng.integers(2, 4)), Canvas(scenes.background(rng)), [], []
  for where, middle in _grid(along).items():
    sign, text = _written(rng, parts)
    width = rng.uniform(0.6, 1.0) * FILLED / along * SIDE
    canvas.write(_add_at(canvas, SIGN, sign.pixels, middle, width), sign.writing)
    heights.append(sign.digit_height * width / max(sign.pixels.size))
    asked.append(Question("board", f"what does the {where} sign say?", text))
  return canvas.scene(), asked, float(np.mean(heights)) / PATCH


def drill(rng: np.random.Generator, parts: Parts) -> Drawn:
  """Three by three tiny things and small signs, all asked about: for training, where it teaches most."""
  along, canvas, asked = 3, Canvas(scenes.background(rng)), []
  for where, middle in _grid(along).items():
    size = float(rng.choice(SIZES)) * PATCH
    moved = tuple(at + rng.uniform(-0.15, 0.15) / along for at in middle)
    if rng.random() < 0.5:
      kind = str(rng.choice(KINDS))
      _add_at(canvas, *parts.draw(rng, kind), moved, size)
      asked.append(Question("drill", f"what kind of thing is the tiny one at the {where}?", kind))
    else:
      sign, text = _written(rng, parts)
      width = min(max(sign.pixels.size) * size / sign.digit_height, FILLED / along * SIDE)
      canvas.write(_add_at(canvas, SIGN, sign.pixels, moved, width), sign.writing)
      asked.append(Question("drill", f"what does the {where} sign say?", text))
  return Drawn(canvas.scene(), {"drill": [asked[i] for i in rng.permutation(len(asked))]})


def busy(rng: np.random.Generator, parts: Parts) -> Drawn:
  """Most of what is asked about in one scene: for training, where each picture then teaches more.

  A tiny thing and what is next to it, or two kinds of tiny things to count; a sign with a number and one with a word.
  """
  kinds = [str(kind) for kind in rng.choice(KINDS, size=4, replace=False)]
  sizes = rng.choice(SIZES, size=4)
  if rng.random() < 0.5:
    canvas, asked = _tiny_and_next(rng, parts, kinds[: int(rng.integers(3, 5))], sizes[0])
  else:
    canvas = Canvas(scenes.background(rng))
    asked = [_add_crowd(rng, canvas, parts, *own) for own in zip(kinds[:2], sizes[:2], strict=True)]
    _add_large_things(rng, canvas, parts, kinds[2 : int(rng.integers(3, 5))])
  for text, size in zip(_number_and_word(rng), sizes[2:], strict=True):
    sign = signs.draw(rng, parts.faces[rng.integers(len(parts.faces))], text)
    asked.append(_add_sign(rng, canvas, sign, text, size))
  return Drawn(canvas.scene(), {"busy": [asked[i] for i in rng.permutation(len(asked))]})


def _written(rng: np.random.Generator, parts: Parts) -> tuple[signs.Sign, str]:
  """A sign with a number of one or two digits, or with a word."""
  number, word = _number_and_word(rng)
  text = number if rng.random() < 0.5 else word
  return signs.draw(rng, parts.faces[rng.integers(len(parts.faces))], text), text


def _number_and_word(rng: np.random.Generator) -> tuple[str, str]:
  """A number of one or two digits, and a word."""
  return str(rng.integers(10 ** int(rng.integers(1, 3)))), signs.WORDS[rng.integers(len(signs.WORDS))]


def _grid(along: int) -> dict[str, tuple[float, float]]:
  """The middles of the cells of a grid by their names, row by row."""
  names = [names[:: 4 - along] for names in (ROWS, COLUMNS)]
  places = [(index + 0.5) / along for index in range(along)]
  return {
    "middle" if row == column else f"{row} {column}": (x, y)
    for row, y in zip(names[0], places, strict=True)
    for column, x in zip(names[1], places, strict=True)
  }


def _add_at(canvas: Canvas, cutout: Cutout, pixels: Image.Image, middle: tuple[float, float], longest: float) -> Thing:
  """Adds a thing with its middle at a place, its longer side of so many pixels."""
  width, height = size = tuple(max(8, round(length * longest / max(pixels.size))) for length in pixels.size)
  (x, y), half = middle, (width / SIDE / 2, height / SIDE / 2)
  return canvas.add(cutout, pixels, (x - half[0], y - half[1], x + half[0], y + half[1]), size)


def _add_large_things(rng: np.random.Generator, canvas: Canvas, parts: Parts, kinds: Sequence[str]) -> Sequence[Thing]:
  largest = 0.5 if len(kinds) == 1 else 0.42
  return [canvas.place(rng, *parts.draw(rng, kind), rng.uniform(0.65, 1.0) * largest) for kind in kinds]


def _add_tiny_thing(rng: np.random.Generator, canvas: Canvas, parts: Parts, kind: str, size: float) -> Thing:
  canvas.place(rng, *parts.draw(rng, kind), size * PATCH / SIDE)
  canvas.things[-1] = canvas.things[-1]._replace(is_tiny=True)
  return canvas.things[-1]


def _distance(one: Thing, other: Thing) -> float:
  """The distance of the nearest points of two boxes, as a share of the picture's side."""
  gaps = (max(0.0, one.box[axis] - other.box[axis + 2], other.box[axis] - one.box[axis + 2]) for axis in (0, 1))
  return float(np.hypot(*gaps))
