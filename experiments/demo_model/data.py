"""Training samples: pictures with questions and answers, from scenes, details and easy-VQA's training pictures."""

import collections
import itertools
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from checkpoints_convert.demo import easyvqa
from experiments.demo_model import cutouts, details, questions, scenes, signs
from himap_jax.checkpoint import default_cache_dir
from himap_jax.run.pictures import load_image

Asked = tuple[str, str]  # a question and its answer


class Sample(NamedTuple):
  """A picture and questions about it."""

  picture: Image.Image
  questions: Sequence[Asked]


class Pool(NamedTuple):
  """Questions with one answer per shape and colour: open-ended, and yes-or-no with a rarer or the commonest answer."""

  open_ended: list[Asked]
  unexpected: list[Asked]
  expected: list[Asked]


class Shares(NamedTuple):
  """Shares of pictures that are scenes and details, the others being easy-VQA's.

  Attributes:
    drill: share of details that are drills: many small things and signs, all asked about.
    busy: share of drills that are busy scenes instead, with questions worded as in tests.
  """

  scene: float
  detail: float = 0.0
  drill: float = 0.0
  busy: float = 0.0


class Mixture:
  """Deterministic samples of scenes, details and easy-VQA; without a share of details nothing of them is fetched."""

  def __init__(self, shares: Shares):
    cache_dir = default_cache_dir()
    self._pools = list(question_pools(easyvqa.load(cache_dir, "train")).items())
    self._cutouts = cutouts.load(cache_dir)["train"]
    faces = signs.faces(cache_dir, "train") if shares.detail else []
    self._parts = details.Parts.of(self._cutouts, faces)
    self.shares = shares

  def names(self) -> list[str]:
    return sorted({cutout.name for cutout in self._cutouts if cutout.name})

  def draw_shape(self, rng: np.random.Generator) -> tuple[Image.Image, Pool]:
    """A picture of easy-VQA, and the questions about all pictures of its shape and colour."""
    path, pool = self._pools[rng.integers(len(self._pools))]
    return load_image(path), pool

  def draw_scene(self, rng: np.random.Generator) -> scenes.Scene:
    return scenes.compose(rng, self._cutouts)

  def draw_detail(self, rng: np.random.Generator) -> scenes.Scene:
    return details.compose(rng, self._parts).scene

  def draw_board(self, rng: np.random.Generator) -> scenes.Scene:
    return details.board(rng, self._parts)[0]

  def draw(self, num_pictures: int, *, seed: tuple[int, int]) -> list[Sample]:
    rng = np.random.default_rng(seed)
    return [self._draw_one(rng, source) for source in rng.random(num_pictures)]

  def _draw_one(self, rng: np.random.Generator, source: float) -> Sample:
    if source < self.shares.scene:
      return self._ask_about_scene(rng)
    is_detail = source < self.shares.scene + self.shares.detail
    return self._ask_about_detail(rng) if is_detail else self._ask_about_shape(rng)

  def _ask_about_shape(self, rng: np.random.Generator) -> Sample:
    # Kinds take turns: five in six of the original yes-or-no questions can be answered from their words alone, and a
    # short training on them learns only that.
    picture, pool = self.draw_shape(rng)
    return Sample(picture, take_turns([[kind[i] for i in rng.permutation(len(kind))] for kind in pool]))

  def _ask_about_scene(self, rng: np.random.Generator) -> Sample:
    scene = self.draw_scene(rng)
    asked = [[own[1:] for own in questions_of_type] for questions_of_type in questions.ask(rng, scene).values()]
    # Lists teach more per picture than questions, of whose tokens one in ten is an answer.
    across, down, places = (own[1:] for (own,) in questions.ask_for_lists(scene).values())
    asked += [[across, down], [places]]
    return Sample(scene.picture, take_turns([asked[i] for i in rng.permutation(len(asked))]))

  def _ask_about_detail(self, rng: np.random.Generator) -> Sample:
    drill, busy = self.shares.drill, self.shares.busy
    if drill and rng.random() < drill:  # no number is drawn for what there is none of
      make = details.busy if busy and rng.random() < busy else details.drill
      drawn = make(rng, self._parts)
      return Sample(drawn.scene.picture, [own[1:] for asked in drawn.questions.values() for own in asked])
    detail = details.compose(rng, self._parts)
    asked = [[question[1:] for question in own] for own in detail.questions.values()]
    if not detail.questions["board"]:
      asked += [
        [own[1:] for own in questions_of_type] for questions_of_type in questions.ask_for_lists(detail.scene).values()
      ]
    return Sample(detail.scene.picture, take_turns([asked[i] for i in rng.permutation(len(asked))]))


def take_turns(kinds: Sequence[Sequence[Asked]]) -> list[Asked]:
  """Interleaves: the first of every kind, then the second of every kind, and so on."""
  turns = itertools.chain.from_iterable(itertools.zip_longest(*kinds))
  return [question for question in turns if question is not None]


def question_pools(examples: Sequence[easyvqa.Example]) -> dict[pathlib.Path, Pool]:
  """For every picture whose questions reveal its shape and colour, the questions of all pictures like it."""
  by_picture: dict[pathlib.Path, dict[str, str]] = collections.defaultdict(dict)
  for example in examples:
    by_picture[example.image][example.question] = example.answer
  alike: dict[frozenset[str], list[pathlib.Path]] = collections.defaultdict(list)
  for picture, asked in by_picture.items():
    appearance = frozenset(asked.values()) - {"yes", "no"}
    if len(appearance) == 2:
      alike[appearance].append(picture)
  guesses = questions.commonest((example.question, example.answer) for example in examples)
  pools = {}
  for pictures in alike.values():
    pool = Pool([], [], [])
    for question, answer in {q: a for picture in pictures for q, a in by_picture[picture].items()}.items():
      yes_or_no = pool.expected if answer == guesses[question] else pool.unexpected
      (yes_or_no if answer in ("yes", "no") else pool.open_ended).append((question, answer))
    pools |= dict.fromkeys(pictures, pool)
  return pools
