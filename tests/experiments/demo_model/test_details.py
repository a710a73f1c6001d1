"""Details: every answer is found again from the boxes and the writing alone, and sizes are what they say."""

import collections
import itertools
import pathlib

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw

from experiments.demo_model import align, details, sets, signs
from experiments.demo_model.cutouts import KINDS, Cutout
from experiments.demo_model.scenes import SIDE
from himap_jax.errors import UserError

NUM_SCENES = 80


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
  folder, pictures = tmp_path_factory.mktemp("cutouts"), []
  for index, kind in enumerate(KINDS):
    picture = Image.new("RGBA", (90, 60 + 5 * index))
    ImageDraw.Draw(picture).ellipse((0, 0, 89, 59), fill=(20 * index, 250 - 20 * index, 40, 255))
    picture.save(folder / f"{kind}.png")
    pictures.append(Cutout(folder / f"{kind}.png", kind, None, None))
  fonts = pathlib.Path(matplotlib.get_data_path(), "fonts/ttf")
  return details.Parts.of(pictures, [fonts / "DejaVuSans.ttf", fonts / "DejaVuSerif-Bold.ttf"])


@pytest.fixture(scope="module")
def drawn(parts):
  return [details.compose(np.random.default_rng(index), parts) for index in range(NUM_SCENES)]


def test_answers_follow_from_boxes_and_writing(drawn):
  seen = collections.Counter()
  for detail in drawn:
    assert detail.scene.picture.size == (SIDE, SIDE)
    for type, asked in detail.questions.items():
      for question in asked:
        assert question.type == type
        expected = answer(question, detail.scene)
        assert expected in (question.answer, once(question.answer)), question
        seen[type] += 1
  assert set(seen) == set(details.TYPES)


def answer(question, scene):
  """The answer, read off boxes, in pixels, and characters."""
  boxes = [np.array(thing.box) * SIDE for thing in scene.things]
  kinds = [thing.cutout.kind for thing in scene.things]
  longest = [max(box[2:] - box[:2]) for box in boxes]
  words = question.question.rstrip("?").split()
  asked = [kind for kind in KINDS if any(word.removesuffix("s") == kind for word in words)]
  if question.type == "tiny":
    return kinds[int(np.argmin(longest))]
  if question.type == "next":
    (tiny,) = [box for box, kind in zip(boxes, kinds, strict=True) if kind == asked[0]]
    apart = [np.hypot(*np.maximum(0, np.maximum(tiny[:2] - box[2:], box[:2] - tiny[2:]))) for box in boxes]
    nearest = [index for index in np.argsort(apart) if kinds[index] != asked[0]]
    assert apart[nearest[1]] - apart[nearest[0]] > 0.1 * SIDE
    return kinds[nearest[0]]
  if question.type in ("crowd", "sheet"):
    return str(kinds.count(asked[0]))
  if question.type in ("digits", "word"):
    return read(scene.writing)
  along = round(len(boxes) ** 0.5)
  names = {"top": 0, "left": 0, "middle": 1, "bottom": along - 1, "right": along - 1}
  place = words[words.index("the") + 1 : len(words) - (2 if question.type == "board" else 1)]
  row, column = (1, 1) if place == ["middle"] else (names[place[0]], names[place[1]])
  y, x = (slice(round(SIDE * i / along), round(SIDE * (i + 1) / along)) for i in (row, column))
  if question.type == "board":
    return read(scene.writing[y, x])
  (inside,) = [k for k, b in zip(kinds, boxes, strict=True) if x.start < b[::2].mean() < x.stop and y.start < b[1::2].mean() < y.stop]  # fmt: skip
  return inside


def read(writing):
  """The characters along the row that has most of them, doubled ones once."""
  row = writing[np.argmax((writing > 0).sum(1))]
  return once(map(chr, row[row > 0]))


def once(text):
  return "".join(character for character, _ in itertools.groupby(text))


def test_sizes_are_those_of_small_things_and_digits(parts):
  for size in (1.0, 2.0, 4.0):
    for index in range(20):
      detail = details.compose(np.random.default_rng(index), parts, size=size)
      longest = [max(t.box[2] - t.box[0], t.box[3] - t.box[1]) * SIDE / details.PATCH for t in detail.scene.things]
      if detail.questions["tiny"] or detail.questions["crowd"]:
        assert min(longest) == pytest.approx(size, abs=0.05)
        assert detail.size == size
      if detail.questions["digits"]:
        rows = np.flatnonzero((detail.scene.writing > 0).any(1))
        assert 0.9 * size < (rows[-1] - rows[0] + 1) / details.PATCH < 1.3 * size + 0.3
      if detail.questions["sheet"] or detail.questions["board"]:
        along = round(len(longest) ** 0.5)
        assert max(longest) < 24 / along
      if detail.questions["sheet"]:
        assert max(longest) == pytest.approx(details.FILLED * detail.size, abs=0.1)
      if detail.questions["board"]:
        rows = np.flatnonzero((detail.scene.writing > 0).any(1))
        assert detail.size * along < len(rows) / details.PATCH < 1.7 * detail.size * along


def test_drills_ask_about_everything(parts):
  names = {"top": 0.0, "left": 0.0, "middle": 0.5, "bottom": 1.0, "right": 1.0}
  for index in range(20):
    scene, questions, _ = details.drill(np.random.default_rng(index), parts)
    assert len({own.question for own in questions["drill"]}) == len(scene.things) == 9
    for own in questions["drill"]:
      words = own.question.rstrip("?").removesuffix("sign say").split()
      *row, column = words[len(words) - words[::-1].index("the") :]
      place = names[column], names[row[0] if row else "middle"]
      apart = [np.hypot(*(np.add(t.box[:2], t.box[2:]) / 2 - 0.2 - 0.6 * np.array(place))) for t in scene.things]
      thing = scene.things[int(np.argmin(apart))]
      left, top, right, bottom = (max(0, round(side * SIDE)) for side in thing.box)
      found = read(scene.writing[top:bottom, left:right]) if thing.cutout is details.SIGN else thing.cutout.kind
      assert found in (own.answer, once(own.answer)), own
      assert max(right - left, bottom - top) >= 8


def test_busy_scenes_are_asked_as_tests_are(parts):
  """A sign's question names what is written on it, a number or a word; all other questions are about the other things."""
  seen = collections.Counter()
  for index in range(20):
    scene, questions, _ = details.busy(np.random.default_rng(index), parts)
    seen.update(own.type for own in questions["busy"])
    signs = [thing for thing in scene.things if thing.cutout is details.SIGN]
    others = scene._replace(things=tuple(thing for thing in scene.things if thing.cutout is not details.SIGN))
    texts = []
    for sign in signs:
      left, top, right, bottom = (max(0, round(side * SIDE)) for side in sign.box)
      texts.append(read(scene.writing[top:bottom, left:right]))
    assert len(questions["busy"]) == 4 and len(texts) == 2
    for own in questions["busy"]:
      found = [answer(own, others)] if own.type in ("tiny", "next", "crowd") else texts
      assert own.answer in found or once(own.answer) in found, own
      assert own.answer.isdigit() == (own.type in ("digits", "crowd"))
  assert seen["digits"] == seen["word"] == 20 and seen["tiny"] == seen["next"] == 20 - seen["crowd"] / 2 > 4


def test_characters_are_described_where_they_are(drawn):
  words = align.vocabulary([])
  for detail in drawn[:20]:
    labels = align.describe_scene(detail.scene, 24, words).reshape(24, 24, -1)
    shares = detail.scene.writing.reshape(24, 14, 24, 14)
    for character in signs.CHARACTERS:
      expected = align.CHARACTER_WEIGHT * (shares == ord(character)).mean((1, 3))
      np.testing.assert_allclose(labels[..., words.index(character)], expected, atol=1e-6)


def test_only_details_have_a_size():
  with pytest.raises(UserError, match="has none"):
    sets.load("scenes", "test", size=1.0)
