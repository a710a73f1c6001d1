"""Training samples: pictures with questions and answers, drawn from composed scenes and easy-VQA's training pictures."""

import collections
import itertools
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from checkpoints_convert.demo import easyvqa
from experiments.demo_model import cutouts, questions, scenes
from himap_jax.checkpoint import default_cache_dir


class Sample(NamedTuple):
  """A picture and questions about it, each with its answer."""

  picture: Image.Image
  questions: Sequence[tuple[str, str]]


class Pool(NamedTuple):
  """Questions that every picture of one shape and colour answers alike, each with its answer.

  They are about shape or colour, or have a yes or no that is not, or that is, what most pictures would answer.
  """

  open_ended: list[tuple[str, str]]
  unexpected: list[tuple[str, str]]
  expected: list[tuple[str, str]]


class EasyVqa:
  """Samples from easy-VQA's training pictures.

  A picture is asked what was asked of all pictures of its shape and colour. Three kinds of question take turns: about shape or
  colour, yes or no as few pictures would answer, yes or no as most would. Five of six yes-or-no questions as they come can be
  answered by a rule about the words alone, and that rule is all that a short training on them learns.
  """

  def __init__(self):
    self._pools = question_pools(easyvqa.load(default_cache_dir(), "train"))
    self._pictures = list(self._pools)

  def draw_picture(self, rng: np.random.Generator) -> tuple[Image.Image, list[str]]:
    """A picture, and the words for its shape and colour."""
    path = self._draw(rng)
    return open_picture(path), sorted({answer for _, answer in self._pools[path].open_ended})

  def draw(self, rng: np.random.Generator) -> Sample:
    """A picture and its questions."""
    path = self._draw(rng)
    kinds = [[kind[i] for i in rng.permutation(len(kind))] for kind in self._pools[path]]
    return Sample(open_picture(path), take_turns(kinds))

  def _draw(self, rng: np.random.Generator) -> pathlib.Path:
    return self._pictures[rng.integers(len(self._pictures))]


class Scenes:
  """Samples from composed scenes; the ten types of question and two kinds of lists take turns.

  A list names everything in order, or says where everything is. It teaches more in a picture than questions do, of whose
  tokens one in ten is an answer.
  """

  def __init__(self):
    self._cutouts = cutouts.load(default_cache_dir())["train"]
    self.names = sorted({cutout.name for cutout in self._cutouts if cutout.name})

  def draw_scene(self, rng: np.random.Generator) -> scenes.Scene:
    """A scene alone."""
    return scenes.compose(rng, self._cutouts)

  def draw(self, rng: np.random.Generator) -> Sample:
    """A scene's picture and its questions."""
    scene = self.draw_scene(rng)
    asked = [[own[1:] for own in questions_of_type] for questions_of_type in questions.ask(rng, scene).values()]
    across, down, places = (own[1:] for (own,) in questions.ask_for_lists(scene).values())
    asked += [[across, down], [places]]
    return Sample(scene.picture, take_turns([asked[i] for i in rng.permutation(len(asked))]))


class Mixture:
  """Samples of both; the same for the same seed."""

  def __init__(self, *, scene_share: float = 0.75):
    """Reads both sources; `scene_share` is the share of pictures that are scenes."""
    self.easyvqa, self.scenes = EasyVqa(), Scenes()
    self._scene_share = scene_share

  def draw(self, num_pictures: int, *, seed: tuple[int, int]) -> list[Sample]:
    """Draws samples."""
    rng = np.random.default_rng(seed)
    is_scene = rng.random(num_pictures) < self._scene_share
    return [(self.scenes if scene else self.easyvqa).draw(rng) for scene in is_scene]


def take_turns(kinds: Sequence[Sequence[tuple[str, str]]]) -> list[tuple[str, str]]:
  """The first of every kind, then the second of every kind, and so on."""
  turns = itertools.chain.from_iterable(itertools.zip_longest(*kinds))
  return [question for question in turns if question is not None]


def open_picture(path: pathlib.Path) -> Image.Image:
  """The picture in a file, in RGB."""
  with Image.open(path) as picture:
    return picture.convert("RGB")


def question_pools(examples: Sequence[easyvqa.Example]) -> dict[pathlib.Path, Pool]:
  """For every picture whose shape and colour its questions tell, the questions of all pictures like it."""
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
      is_open = answer not in ("yes", "no")
      kind = pool.open_ended if is_open else pool.expected if answer == guesses[question] else pool.unexpected
      kind.append((question, answer))
    pools |= dict.fromkeys(pictures, pool)
  return pools
