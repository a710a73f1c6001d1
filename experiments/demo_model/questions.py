"""Questions about scenes, determined by the random numbers, of ten types:

| type     | question                                                                 | answer                        |
|----------|--------------------------------------------------------------------------|-------------------------------|
| presence | is there an animal?                                                      | yes, no                       |
| kind     | what kind of thing is furthest left?                                     | a kind                        |
| name     | what is the animal called?                                               | a name that training has used |
| count    | how many things are there?                                               | 1 … 6                         |
| number   | how many animals are there?                                              | 0 … 6                         |
| colour   | what colour is the animal?                                               | a colour                      |
| place    | is the animal on the left or on the right? (at the top or at the bottom) | left, right, top, bottom      |
| relation | is the animal to the left or to the right of the plant? (above or below) | left, right, above, below     |
| corner   | what kind of thing is in the top left corner?                            | a kind, nothing               |
| empty    | is there nothing in the top left corner?                                 | yes, no                       |

Lists, whose answers are as long as captions, ask for everything from left to right, from top to bottom, and by place.

Yes and no, the two sides of a relation, and the answers of the other types are drawn as evenly as the scenes allow.
"""

import collections
import itertools
from collections.abc import Hashable, Iterable, Iterator

import numpy as np

from experiments.demo_model.cutouts import KINDS
from experiments.demo_model.scenes import Scene, overlap
from experiments.demo_model.wording import Question, one_of, plural, with_article

TYPES = ("presence", "kind", "name", "count", "number", "colour", "place", "relation", "corner", "empty")
CORNERS = {
  "top left": (0.0, 0.0, 0.4, 0.4),
  "top right": (0.6, 0.0, 1.0, 0.4),
  "bottom left": (0.0, 0.6, 0.4, 1.0),
  "bottom right": (0.6, 0.6, 1.0, 1.0),
}
APART = 0.15  # how much further left a thing must be to be "furthest left" or "to the left"
OFF_CENTRE = 0.08  # how far from the middle of the picture a thing must be to be "on the left"


def ask(rng: np.random.Generator, scene: Scene) -> dict[str, list[Question]]:
  """Questions about a scene by type, in random order; some are left out where answers are uneven by nature."""
  questions: dict[str, list[Question]] = {type: [] for type in TYPES}
  parts = (_about_kinds(rng, scene), _about_extremes(scene), _about_single(scene), _about_pairs(scene))
  for question in itertools.chain(*parts, _about_corners(rng, scene)):
    questions[question.type].append(question)
  return {type: [asked[i] for i in rng.permutation(len(asked))] for type, asked in questions.items()}


def _about_kinds(rng: np.random.Generator, scene: Scene) -> Iterator[Question]:
  present = [kind for kind in KINDS if scene.of_kind(kind)]
  absent = [str(kind) for kind in rng.permutation([kind for kind in KINDS if kind not in present])]
  for kind in present:
    yield Question("presence", f"is there {with_article(kind)}?", "yes")
    if len(scene.of_kind(kind)) > 1 or rng.random() < 0.4:
      yield Question("number", f"how many {plural(kind)} are there?", str(len(scene.of_kind(kind))))
  for kind in absent[: len(present)]:
    yield Question("presence", f"is there {with_article(kind)}?", "no")
  for kind in absent[len(present) : len(present) + (len(present) + 1) // 2]:
    yield Question("number", f"how many {plural(kind)} are there?", "0")
  yield Question("count", "how many things are there?", str(len(scene.things)))


def _about_extremes(scene: Scene) -> Iterator[Question]:
  for where, axis, sign in (("left", 0, 1), ("right", 0, -1), ("to the top", 1, 1), ("to the bottom", 1, -1)):
    order = sorted(scene.things, key=lambda thing: sign * thing.middle[axis])
    if len(order) == 1 or sign * (order[1].middle[axis] - order[0].middle[axis]) > APART:
      yield Question("kind", f"what kind of thing is furthest {where}?", order[0].cutout.kind)


def _about_single(scene: Scene) -> Iterator[Question]:
  for thing in scene.alone():
    kind, name, colour = one_of(thing.cutout.kind), thing.cutout.name, thing.cutout.colour
    if name:
      yield Question("name", f"what is the {kind} called?", name)
    if colour:
      yield Question("colour", f"what colour is the {kind}?", colour)
    for middle, at, low, high in zip(thing.middle, ("on", "at"), ("left", "top"), ("right", "bottom"), strict=True):
      if abs(middle - 0.5) > OFF_CENTRE:
        answer = low if middle < 0.5 else high
        yield Question("place", f"is the {kind} {at} the {low} or {at} the {high}?", answer)


def _about_pairs(scene: Scene) -> Iterator[Question]:
  for first, second in itertools.product(scene.alone(), repeat=2):
    (x, y), (u, v), one, other = first.middle, second.middle, one_of(first.cutout.kind), one_of(second.cutout.kind)
    if abs(x - u) > APART:
      asked = f"is the {one} to the left or to the right of the {other}?"
      yield Question("relation", asked, "left" if x < u else "right")
    if abs(y - v) > APART:
      yield Question("relation", f"is the {one} above or below the {other}?", "above" if y < v else "below")


def _about_corners(rng: np.random.Generator, scene: Scene) -> Iterator[Question]:
  for name, corner in CORNERS.items():
    what, is_empty = f"what kind of thing is in the {name} corner?", f"is there nothing in the {name} corner?"
    inside = [thing for thing in scene.things if overlap(thing.box, corner)]
    middles = [thing for thing in inside if overlap((*thing.middle, *thing.middle), corner)]
    if len(middles) == 1:
      yield Question("corner", what, middles[0].cutout.kind)
    if middles and rng.random() < 0.18:
      yield Question("empty", is_empty, "no")
    if not inside:
      yield Question("empty", is_empty, "yes")
      if rng.random() < 0.2:
        yield Question("corner", what, "nothing")


def ask_for_lists(scene: Scene) -> dict[str, list[Question]]:
  """Questions about everything in a scene: from left to right, from top to bottom, and with its place."""
  across, down = (sorted(scene.things, key=lambda thing: thing.middle[axis]) for axis in (0, 1))
  places = []
  for thing in across:
    x, y = (min(int(3 * position), 2) for position in thing.middle)
    places.append(f"{thing.cutout.kind} {('left', 'middle', 'right')[x]} {('top', 'middle', 'bottom')[y]}")
  lists = (
    Question("across", "what is there from left to right?", ", ".join(thing.cutout.kind for thing in across)),
    Question("down", "what is there from top to bottom?", ", ".join(thing.cutout.kind for thing in down)),
    Question("places", "where is everything?", ", ".join(places)),
  )
  return {question.type: [question] for question in lists}


def commonest(pairs: Iterable[tuple[Hashable, str]]) -> dict[Hashable, str]:
  """The most frequent answer of every key."""
  counts = collections.defaultdict(collections.Counter)
  for key, answer in pairs:
    counts[key][answer] += 1
  return {key: answers.most_common(1)[0][0] for key, answers in counts.items()}
