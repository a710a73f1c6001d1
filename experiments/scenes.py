"""Scenes: cut-outs on a background, and what can be asked about them; the same for the same seed.

Questions are of ten types:

| type     | question                                                     | answer                          |
|----------|--------------------------------------------------------------|---------------------------------|
| presence | is there an animal?                                             | yes, no                         |
| kind     | what kind of thing is furthest left?                         | a kind                          |
| name     | what is the animal called?                                     | a name that training has used   |
| count    | how many things are there?                                   | 1 … 6                           |
| number   | how many animals are there?                                    | 0 … 6                           |
| colour   | what colour is the animal?                                     | a colour                        |
| place    | is the animal on the left or on the right? (at the top or at the bottom) | left, right, top, bottom |
| relation | is the animal to the left or to the right of the plant? (above or below) | left, right, above, below |
| corner   | what kind of thing is in the top left corner?                | a kind, nothing                 |
| empty    | is there nothing in the top left corner?                     | yes, no                         |

Lists, answers as long as a caption, say what there is from left to right, from top to bottom, and where everything is.

Yes and no, the two sides of a relation, and the answers of the other types are drawn as evenly as the scenes allow.
Positions are of the middle of a thing, in shares of the picture's width and height.
"""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from experiments import cutouts
from experiments.cutouts import KINDS, Cutout
from himap_jax.checkpoint import default_cache_dir

TYPES = ("presence", "kind", "name", "count", "number", "colour", "place", "relation", "corner", "empty")
SIDE = 336
MAX_THINGS = 6
GUESS_SCENES = 1000
CORNER = 0.4  # a corner is so much of the width and of the height
APART = 0.15  # how much further left a thing is that is "furthest left" or "to the left"
OFF_CENTRE = 0.08  # how far from the middle of the picture a thing is that is "on the left"
PIECES = ("food", "clothing")  # kinds that are counted in pieces
TILT = 12  # degrees
VOWELS = "aeiou"


class Question(NamedTuple):
  """A question about a scene."""

  type: str
  question: str
  answer: str


@dataclasses.dataclass(frozen=True)
class Thing:
  """A cut-out in a scene.

  Attributes:
    cutout: which.
    box: left, top, right, bottom in shares of the picture.
  """

  cutout: Cutout
  box: tuple[float, float, float, float]

  @property
  def middle(self) -> tuple[float, float]:
    left, top, right, bottom = self.box
    return (left + right) / 2, (top + bottom) / 2


@dataclasses.dataclass(frozen=True)
class Scene:
  """A picture and what is in it.

  Attributes:
    picture: `SIDE` pixels wide and high.
    things: what is in it.
    owner: `[SIDE, SIDE]` for every pixel the number of the thing it belongs to, from 1 on; 0 in the background.
  """

  picture: Image.Image
  things: tuple[Thing, ...]
  owner: np.ndarray

  def of_kind(self, kind: str) -> list[Thing]:
    return [thing for thing in self.things if thing.cutout.kind == kind]

  def alone(self) -> list[Thing]:
    """Things that are the only one of their kind."""
    return [thing for thing in self.things if len(self.of_kind(thing.cutout.kind)) == 1]


def compose(rng: np.random.Generator, pictures: Sequence[Cutout]) -> Scene:
  """Draws one to six things of one to five kinds, sizes, places and a background."""
  by_kind = {kind: [c for c in pictures if c.kind == kind] for kind in KINDS}
  count = int(rng.integers(1, MAX_THINGS + 1))
  kinds = rng.choice(KINDS, size=min(count, int(rng.integers(1, len(KINDS)))), replace=False)
  chosen = [*kinds, *rng.choice(kinds, size=count - len(kinds))]
  picture, owner = _background(rng), Image.new("L", (SIDE, SIDE))
  things: list[Thing] = []
  largest = 0.65 if count == 1 else 0.5 if count <= 3 else 0.42
  for kind in chosen:
    cutout = by_kind[kind][rng.integers(len(by_kind[kind]))]
    pixels = cutouts.read(cutout.path)
    if rng.random() < 0.5:
      pixels = pixels.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = pixels.rotate(rng.uniform(-TILT, TILT), Image.Resampling.BICUBIC, expand=True)
    size = rng.uniform(0.65, 1.0) * largest
    while True:
      scale = size * SIDE / max(pixels.size)
      width, height = (max(8, round(side * scale)) for side in pixels.size)
      box = _place(rng, width / SIDE, height / SIDE, things)
      if box is not None:
        break
      size *= 0.85
    pixels = pixels.resize((width, height), Image.Resampling.LANCZOS)
    corner = round(box[0] * SIDE), round(box[1] * SIDE)
    picture.paste(pixels, corner, pixels)
    things.append(Thing(cutout, box))
    owner.paste(len(things), corner, pixels.getchannel("A").point(lambda a: 255 * (a > 128)))
  return Scene(picture, tuple(things), np.asarray(owner))


def _place(
  rng: np.random.Generator, width: float, height: float, things: Sequence[Thing]
) -> tuple[float, float, float, float] | None:
  """A box that touches no other, or None."""
  for _ in range(40):
    left, top = rng.uniform(0.01, 0.99 - width), rng.uniform(0.01, 0.99 - height)
    box = (left, top, left + width, top + height)
    if all(
      box[0] > b[2] + 0.01 or b[0] > box[2] + 0.01 or box[1] > b[3] + 0.01 or b[1] > box[3] + 0.01
      for b in (thing.box for thing in things)
    ):
      return box
  return None


def _background(rng: np.random.Generator) -> Image.Image:
  """A slope between two pale colours with soft blotches."""
  first, second = rng.uniform(150, 255, (2, 3))
  angle = rng.uniform(0, 2 * np.pi)
  y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE - 0.5
  slope = (np.cos(angle) * x + np.sin(angle) * y) / np.sqrt(2) + 0.5
  blotches = Image.fromarray(rng.uniform(0, 255, (8, 8)).astype(np.uint8)).resize(
    (SIDE, SIDE), Image.Resampling.BICUBIC
  )
  colours = first + (second - first) * slope[..., None] + (np.asarray(blotches, np.float32)[..., None] - 127.5) * 0.1
  return Image.fromarray(np.clip(colours, 0, 255).astype(np.uint8))


def ask(rng: np.random.Generator, scene: Scene) -> dict[str, list[Question]]:
  """For every type the questions about a scene, in random order; where answers are uneven by nature, some are left out."""
  present = [kind for kind in KINDS if scene.of_kind(kind)]
  absent = [kind for kind in KINDS if kind not in present]
  absent = [str(kind) for kind in rng.permutation(absent)]
  questions: dict[str, list[Question]] = {type: [] for type in TYPES}

  def add(type: str, question: str, answer: object) -> None:
    questions[type].append(Question(type, question, str(answer)))

  for kind in present:
    add("presence", f"is there {_a(kind)}?", "yes")
    if len(scene.of_kind(kind)) > 1 or rng.random() < 0.4:
      add("number", f"how many {_plural(kind)} are there?", len(scene.of_kind(kind)))
  for kind in absent[: len(present)]:
    add("presence", f"is there {_a(kind)}?", "no")
  for kind in absent[len(present) : len(present) + (len(present) + 1) // 2]:
    add("number", f"how many {_plural(kind)} are there?", 0)
  add("count", "how many things are there?", len(scene.things))
  for where, axis, sign in (("left", 0, 1), ("right", 0, -1), ("to the top", 1, 1), ("to the bottom", 1, -1)):
    order = sorted(scene.things, key=lambda thing: sign * thing.middle[axis])
    if len(order) == 1 or sign * (order[1].middle[axis] - order[0].middle[axis]) > APART:
      add("kind", f"what kind of thing is furthest {where}?", order[0].cutout.kind)
  for thing in scene.alone():
    if thing.cutout.name:
      add("name", f"what is the {_one(thing.cutout.kind)} called?", thing.cutout.name)
    if thing.cutout.colour:
      add("colour", f"what colour is the {_one(thing.cutout.kind)}?", thing.cutout.colour)
    x, y = thing.middle
    if abs(x - 0.5) > OFF_CENTRE:
      add("place", f"is the {_one(thing.cutout.kind)} on the left or on the right?", "left" if x < 0.5 else "right")
    if abs(y - 0.5) > OFF_CENTRE:
      add("place", f"is the {_one(thing.cutout.kind)} at the top or at the bottom?", "top" if y < 0.5 else "bottom")
  for first in scene.alone():
    for second in scene.alone():
      (x, y), (u, v) = first.middle, second.middle
      names = f"the {_one(first.cutout.kind)}", f"the {_one(second.cutout.kind)}"
      if abs(x - u) > APART:
        add("relation", f"is {names[0]} to the left or to the right of {names[1]}?", "left" if x < u else "right")
      if abs(y - v) > APART:
        add("relation", f"is {names[0]} above or below {names[1]}?", "above" if y < v else "below")
  for name, corner in _corners().items():
    inside = [thing for thing in scene.things if _overlaps(thing.box, corner)]
    middles = [
      thing
      for thing in inside
      if corner[0] <= thing.middle[0] <= corner[2] and corner[1] <= thing.middle[1] <= corner[3]
    ]
    if len(middles) == 1:
      add("corner", f"what kind of thing is in the {name} corner?", middles[0].cutout.kind)
    if middles and rng.random() < 0.18:
      add("empty", f"is there nothing in the {name} corner?", "no")
    if not inside:
      add("empty", f"is there nothing in the {name} corner?", "yes")
      if rng.random() < 0.2:
        add("corner", f"what kind of thing is in the {name} corner?", "nothing")
  return {type: [asked[i] for i in rng.permutation(len(asked))] for type, asked in questions.items()}


def ask_for_lists(scene: Scene) -> dict[str, list[Question]]:
  """Questions about everything in a scene: in order across, in order down, and with its place."""
  across, down = (sorted(scene.things, key=lambda thing: thing.middle[axis]) for axis in (0, 1))

  def kinds(things: Sequence[Thing]) -> str:
    return ", ".join(thing.cutout.kind for thing in things)

  def place(thing: Thing) -> str:
    x, y = (min(int(3 * position), 2) for position in thing.middle)
    return f"{thing.cutout.kind} {('left', 'middle', 'right')[x]} {('top', 'middle', 'bottom')[y]}"

  lists = (
    Question("across", "what is there from left to right?", kinds(across)),
    Question("down", "what is there from top to bottom?", kinds(down)),
    Question("places", "where is everything?", ", ".join(map(place, across))),
  )
  return {question.type: [question] for question in lists}


def _corners() -> dict[str, tuple[float, float, float, float]]:
  sides = {"top": (0.0, CORNER), "bottom": (1 - CORNER, 1.0)}, {"left": (0.0, CORNER), "right": (1 - CORNER, 1.0)}
  return {f"{v} {h}": (x[0], y[0], x[1], y[1]) for v, y in sides[0].items() for h, x in sides[1].items()}


def _overlaps(a: Sequence[float], b: Sequence[float]) -> bool:
  return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _one(kind: str) -> str:
  return f"piece of {kind}" if kind in PIECES else kind


def _a(kind: str) -> str:
  name = _one(kind)
  return f"{'an' if name[0] in VOWELS else 'a'} {name}"


def _plural(kind: str) -> str:
  return f"pieces of {kind}" if kind in PIECES else f"{kind}s"


def scene_of(
  split: str, index: int, pictures: Sequence[Cutout], *, lists: bool = False
) -> tuple[Scene, dict[str, list[Question]]]:
  """Scene number `index` of a split, and its questions, or the lists that can be asked for."""
  rng = np.random.default_rng(["train", "test"].index(split) * 10**9 + index)
  scene = compose(rng, pictures)
  return scene, ask_for_lists(scene) if lists else ask(rng, scene)


def commonest_answers(pictures: Sequence[Cutout], *, lists: bool = False) -> tuple[dict[str, str], dict[str, str]]:
  """The commonest answer of every question and, for questions not met, of every type, in scenes of the train split."""
  by_question, by_type = collections.defaultdict(collections.Counter), collections.defaultdict(collections.Counter)
  for index in range(GUESS_SCENES):
    for questions in scene_of("train", index, pictures, lists=lists)[1].values():
      for question in questions:
        by_question[question.question][question.answer] += 1
        by_type[question.type][question.answer] += 1
  return tuple({key: counts.most_common(1)[0][0] for key, counts in by.items()} for by in (by_question, by_type))


def write(directory: pathlib.Path, split: str, num_scenes: int, *, lists: bool = False) -> pathlib.Path:
  """Writes scenes and, of each, one question of every type that it has, or lists; returns the path of `questions.jsonl`.

  A row's `guess` is what can be answered without the picture.
  """
  pictures = cutouts.load(default_cache_dir())
  by_question, by_type = commonest_answers(pictures["train"], lists=lists)
  directory.mkdir(parents=True, exist_ok=True)
  rows = []
  for index in tqdm(range(num_scenes), unit="scene", disable=None):
    scene, asked = scene_of(split, index, pictures[split], lists=lists)
    scene.picture.save(directory / f"{index:05d}.png")
    for type, questions in asked.items():
      if questions:
        _, question, answer = questions[0]
        row = {"id": f"{index:05d}-{type}", "image": f"{index:05d}.png", "question": question, "answer": answer}
        rows.append(row | {"type": type, "guess": by_question.get(question, by_type[type])})
  path = directory / "questions.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
  return path
