"""Scenes and their questions, on cut-outs drawn here: every answer is found again from the boxes alone."""

import collections
import itertools

import numpy as np
import pytest
from PIL import Image, ImageDraw

from experiments.demo_model import align, questions, scenes, sets
from experiments.demo_model.cutouts import COLOUR_NAMES, KINDS, Cutout

NUM_SCENES = 60


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
  folder = tmp_path_factory.mktemp("cutouts")
  found = []
  for index, kind in enumerate(KINDS * 2):
    picture = Image.new("RGBA", (90, 60 + 5 * index))
    ImageDraw.Draw(picture).ellipse((5, 5, 80, 50), fill=(20 * index, 250 - 20 * index, 40, 255))
    path = folder / f"{index}.png"
    picture.save(path)
    found.append(
      Cutout(path, kind, f"{kind}{index}" if index % 2 else None, COLOUR_NAMES[index % 10] if index % 3 else None)
    )
  return found


@pytest.fixture(scope="module")
def drawn(pictures):
  return [sets.scene_at(sets.scenes_of(pictures), "test", index)[:2] for index in range(NUM_SCENES)]


def test_things_are_inside_the_picture_apart_and_where_their_boxes_say(drawn):
  counts = collections.Counter()
  for scene, _ in drawn:
    counts[len(scene.things)] += 1
    assert scene.picture.size == (scenes.SIDE, scenes.SIDE)
    for thing in scene.things:
      assert 0 <= thing.box[0] < thing.box[2] <= 1 and 0 <= thing.box[1] < thing.box[3] <= 1
    for a, b in itertools.combinations([thing.box for thing in scene.things], 2):
      assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]
    assert set(np.unique(scene.instances)) == set(range(len(scene.things) + 1))
    for number, thing in enumerate(scene.things, start=1):
      y, x = np.nonzero(scene.instances == number)
      left, top, right, bottom = (round(side * scenes.SIDE) for side in thing.box)
      assert left - 1 <= x.min() and x.max() <= right + 1 and top - 1 <= y.min() and y.max() <= bottom + 1
      assert len(x) > 20
  assert set(counts) == {1, 2, 3, 4, 5, 6}


def test_answers_follow_from_the_boxes(drawn):
  seen = collections.Counter()
  for scene, asked in drawn:
    for type, own in asked.items():
      for question in own:
        assert question.type == type
        assert question.answer == answer(question.question, scene.things), question
        seen[type] += 1
  assert set(seen) == set(questions.TYPES)


def answer(question: str, things) -> str:
  """The answer, read off the boxes."""
  words = question.rstrip("?").replace("pieces of ", "").replace("piece of ", "").split()
  kinds = [word.removesuffix("s") for word in words if word.removesuffix("s") in KINDS]
  mine = [thing for thing in things if kinds and thing.cutout.kind == kinds[0]]

  def x(thing):
    return (thing.box[0] + thing.box[2]) / 2

  def y(thing):
    return (thing.box[1] + thing.box[3]) / 2

  if question.startswith(("is there a ", "is there an ")):
    return "yes" if mine else "no"
  if question == "how many things are there?":
    return str(len(things))
  if question.startswith("how many"):
    return str(len(mine))
  if "furthest" in question:
    key = {"left": x, "right": lambda t: -x(t), "top": y, "bottom": lambda t: -y(t)}[words[-1]]
    first, *others = sorted(things, key=key)
    assert not others or key(others[0]) - key(first) > 0.15
    return first.cutout.kind
  if question.endswith("called?"):
    assert len(mine) == 1
    return mine[0].cutout.name
  if question.startswith("what colour"):
    assert len(mine) == 1
    return mine[0].cutout.colour
  if "on the left or" in question:
    assert abs(x(mine[0]) - 0.5) > 0.08
    return "left" if x(mine[0]) < 0.5 else "right"
  if "at the top or" in question:
    assert abs(y(mine[0]) - 0.5) > 0.08
    return "top" if y(mine[0]) < 0.5 else "bottom"
  if "or to the right" in question or "above or below" in question:
    other = [thing for thing in things if thing.cutout.kind == kinds[1]]
    assert len(mine) == len(other) == 1
    assert abs(x(mine[0]) - x(other[0]) if "left" in question else y(mine[0]) - y(other[0])) > 0.15
    if "left" in question:
      return "left" if x(mine[0]) < x(other[0]) else "right"
    return "above" if y(mine[0]) < y(other[0]) else "below"
  vertical, horizontal = words[words.index("corner") - 2 : words.index("corner")]

  def within(value, side):
    return value <= 0.4 if side in ("top", "left") else value >= 0.6

  inside = [thing for thing in things if within(y(thing), vertical) and within(x(thing), horizontal)]
  if not inside:  # nothing reaches into an empty corner either
    left, top = 0.6 * (horizontal == "right"), 0.6 * (vertical == "bottom")
    for a, b, c, d in (thing.box for thing in things):
      assert a >= left + 0.4 or c <= left or b >= top + 0.4 or d <= top
  if question.startswith("is there nothing"):
    return "no" if inside else "yes"
  return inside[0].cutout.kind if inside else "nothing"


def test_one_of_a_kind_is_asked_for_less_often_than_it_is_there(drawn):
  alone = [len(scene.of_kind(kind)) == 1 for scene, _ in drawn for kind in KINDS if scene.of_kind(kind)]
  asked = [question.answer for _, own in drawn for question in own["number"]]
  assert asked.count("1") < 0.6 * sum(alone)
  assert len([answer for answer in asked if answer not in ("0", "1")]) == len(alone) - sum(alone)


def test_lists_name_everything_in_order_and_in_its_place(drawn):
  thirds = {"left": 0, "middle": 1, "right": 2, "top": 0, "bottom": 2}
  for scene, _ in drawn:
    (across,), (down,), (places,) = ([q[1:] for q in asked] for asked in questions.ask_for_lists(scene).values())
    boxes = {thing.box: thing.cutout.kind for thing in scene.things}
    for (question, answer), axis in ((across, 0), (down, 1)):
      assert question.endswith(("from left to right?", "from top to bottom?")[axis])
      assert answer.split(", ") == [boxes[box] for box in sorted(boxes, key=lambda box: box[axis] + box[axis + 2])]
    for part, box in zip(places[1].split(", "), sorted(boxes, key=lambda box: box[0] + box[2]), strict=True):
      kind, horizontal, vertical = part.split()
      assert kind == boxes[box]
      for word, low, high in ((horizontal, box[0], box[2]), (vertical, box[1], box[3])):
        assert thirds[word] == int(3 * (low + high) / 2)


def test_the_same_seed_gives_the_same_scene(pictures, drawn):
  scene, asked, _ = sets.scene_at(sets.scenes_of(pictures), "test", 3)
  assert asked == drawn[3][1] and np.array_equal(np.asarray(scene.picture), np.asarray(drawn[3][0].picture))
  assert sets.scene_at(sets.scenes_of(pictures), "train", 3).questions != asked


def test_patches_are_described_by_what_covers_them(drawn):
  words = align.vocabulary([f"{kind}{index}" for index, kind in enumerate(KINDS * 2)])
  grid = 12
  for scene, _ in drawn[:6]:
    labels = align.describe_scene(scene, grid, words).reshape(grid, grid, -1)
    edges = np.linspace(0, scenes.SIDE, grid + 1).round().astype(int)
    for row, column in itertools.product(range(grid), repeat=2):
      patch = scene.instances[edges[row] : edges[row + 1], edges[column] : edges[column + 1]]
      shares = [np.mean(patch == number + 1) for number in range(len(scene.things))]
      thing = scene.things[int(np.argmax(shares))]
      least = align.COVERED_BY_TINY if thing.is_tiny else align.COVERED
      kind = thing.cutout.kind if max(shares) >= least else None
      shown = [word for word in (*KINDS, "nothing") if labels[row, column, words.index(word)] > 0]
      assert shown == [kind or "nothing"]
      left = labels[row, column, words.index("left")] - labels[row, column, words.index("right")]
      assert left == pytest.approx(align.PLACE_WEIGHT * (1 - (2 * column + 1) / grid), abs=1e-6)
