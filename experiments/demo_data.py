"""Packs images and their questions into training sequences.

Axes: B images, S slots, A answer tokens.

    slot      [ system, image ][ question 1, answer 1 ][ question 2, answer 2 ] … padding
    segment     0               1                       2                         UNUSED
    position    0 … P − 1       P, P + 1, …             P, P + 1, …               0
"""

import collections
import dataclasses
import functools
import itertools
import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from PIL import Image

from checkpoints_convert.demo import easyvqa
from experiments import cutouts, scenes
from himap_jax.checkpoint import default_cache_dir
from himap_jax.config import LlavaConfig

UNUSED = -1
ANSWER_SLOTS_SHARE = 2  # of the slots of questions and answers, at most so many are answers: one of two


@flax.struct.dataclass
class Batch:
  """Packed sequences.

  Attributes:
    tokens: `[B, S]` token ids, the image token's in image slots.
    positions: `[B, S]` rotary positions.
    segments: `[B, S]` 0 in the shared prefix, 1 … in the questions, `UNUSED` in padding.
    image_start: `[B]` the first image slot.
    pixel_values: `[B, 3, height, width]`.
    answer_slots: `[B, A]` the slots before each answer token, whose logits predict it.
    answers: `[B, A]` the answer tokens, each answer's end included.
    answer_valid: `[B, A]` false in padding.
    answer_question: `[B, A]` which question of the image the token answers.
  """

  tokens: Int[Array, "B S"]
  positions: Int[Array, "B S"]
  segments: Int[Array, "B S"]
  image_start: Int[Array, "B"]
  pixel_values: Float[Array, "B 3 h w"]
  answer_slots: Int[Array, "B A"]
  answers: Int[Array, "B A"]
  answer_valid: Bool[Array, "B A"]
  answer_question: Int[Array, "B A"]

  def mask(self) -> Bool[Array, "B 1 S S"]:
    """True where a slot may attend beside what causality hides: to the prefix and to its own segment."""
    query, key = self.segments[:, :, None], self.segments[:, None, :]
    return ((key == 0) | (key == query))[:, None]


class Lesson(NamedTuple):
  """A picture and questions about it, each with its answer."""

  picture: Image.Image
  questions: Sequence[tuple[str, str]]


class EasyVqa:
  """Lessons from easy-VQA's training pictures.

  A lesson asks a picture what was asked of all pictures of its shape and colour. Three kinds of question take turns: about
  shape or colour, yes or no as few pictures would answer, yes or no as most would. Left as they come, five of six questions
  that yes or no answers can be answered by a rule about the words alone, and that rule is all that a short training learns.
  """

  def __init__(self):
    self._pools = question_pools("train")
    self._pictures = list(self._pools)

  def shape(self, rng: np.random.Generator) -> tuple[Image.Image, list[str]]:
    """A picture, and the words for its shape and colour."""
    picture = self._pictures[rng.integers(len(self._pictures))]
    return open_picture(picture), sorted({example.answer for example in self._pools[picture].open_ended})

  def draw(self, rng: np.random.Generator) -> Lesson:
    picture = self._pictures[rng.integers(len(self._pictures))]
    pool = self._pools[picture]
    kinds = [pool.open_ended, pool.unexpected, pool.expected]
    kinds = [[(kind[i].question, kind[i].answer) for i in rng.permutation(len(kind))] for kind in kinds]
    return Lesson(open_picture(picture), take_turns(kinds))


class Scenes:
  """Lessons from composed scenes; the ten types of question and two kinds of lists take turns.

  A list says of everything what it is and where. It teaches more in a picture than questions do, of whose tokens one in ten
  is an answer.
  """

  def __init__(self):
    self._cutouts = cutouts.load(default_cache_dir())["train"]
    self.names = sorted({cutout.name for cutout in self._cutouts if cutout.name})

  def compose(self, rng: np.random.Generator) -> scenes.Scene:
    """A scene alone."""
    return scenes.compose(rng, self._cutouts)

  def draw(self, rng: np.random.Generator) -> Lesson:
    scene = self.compose(rng)
    asked = [[(q.question, q.answer) for q in questions] for questions in scenes.ask(rng, scene).values()]
    across, down, places = (questions[0][1:] for questions in scenes.ask_for_lists(scene).values())
    asked += [[across, down], [places]]
    return Lesson(scene.picture, take_turns([asked[i] for i in rng.permutation(len(asked))]))


class Lessons:
  """A mixture of both; the same for the same seed."""

  def __init__(self, *, scene_share: float):
    self.shapes, self.scenes = EasyVqa(), Scenes()
    self._scene_share = scene_share

  def draw(self, num_pictures: int, *, seed: tuple[int, int]) -> list[Lesson]:
    rng = np.random.default_rng(seed)
    scene = rng.random(num_pictures) < self._scene_share
    return [(self.scenes if drawn else self.shapes).draw(rng) for drawn in scene]


def take_turns(kinds: Sequence[Sequence[tuple[str, str]]]) -> list[tuple[str, str]]:
  """The first of every kind, then the second of every kind, and so on."""
  turns = itertools.chain.from_iterable(itertools.zip_longest(*kinds))
  return [question for question in turns if question is not None]


def open_picture(path: pathlib.Path) -> Image.Image:
  """The picture in a file, in RGB."""
  with Image.open(path) as picture:
    return picture.convert("RGB")


def questions_by_image(split: str) -> list[list[easyvqa.Example]]:
  """easy-VQA's questions of a split, grouped by image."""
  groups = collections.defaultdict(list)
  for example in easyvqa.load(default_cache_dir(), split):
    groups[example.image].append(example)
  return list(groups.values())


@dataclasses.dataclass(frozen=True)
class Pool:
  """Questions that every picture of one shape and colour answers alike.

  Attributes:
    open_ended: about its shape or colour.
    unexpected: yes or no, and not what most pictures would answer.
    expected: yes or no, as most pictures would answer.
  """

  open_ended: tuple[easyvqa.Example, ...]
  unexpected: tuple[easyvqa.Example, ...]
  expected: tuple[easyvqa.Example, ...]


def question_only_answers(examples: list[easyvqa.Example]) -> dict[str, str]:
  """The commonest answer of every question: what can be known without the image."""
  counts = collections.defaultdict(collections.Counter)
  for example in examples:
    counts[example.question][example.answer] += 1
  return {question: answers.most_common(1)[0][0] for question, answers in counts.items()}


def question_pools(split: str) -> dict[pathlib.Path, Pool]:
  """For every picture of a split whose shape and colour its questions tell, the questions of all pictures like it."""
  alike = collections.defaultdict(list)
  for group in questions_by_image(split):
    appearance = frozenset(example.answer for example in group) - {"yes", "no"}
    if len(appearance) == 2:
      alike[appearance].append(group)
  guesses = question_only_answers(easyvqa.load(default_cache_dir(), split))
  pools = {}
  for groups in alike.values():
    questions = {example.question: example for group in groups for example in group}.values()
    yes_no = [example for example in questions if example.answer in ("yes", "no")]
    pool = Pool(
      open_ended=tuple(example for example in questions if example.answer not in ("yes", "no")),
      unexpected=tuple(example for example in yes_no if example.answer != guesses[example.question]),
      expected=tuple(example for example in yes_no if example.answer == guesses[example.question]),
    )
    pools |= {group[0].image: pool for group in groups}
  return pools


class Packer:
  """Packs to one static shape: a fixed number of slots for the questions of an image.

  Attributes:
    grid: image tokens along a side.
  """

  def __init__(self, processor: Any, config: LlavaConfig, *, image_size: int, question_slots: int):
    self._processor = processor
    self._image_token = config.image_token_id
    self._num_image_tokens = config.num_image_tokens(image_size, image_size)
    self._image_size = image_size
    self.grid = math.isqrt(self._num_image_tokens)
    self._question_slots = question_slots
    self._tokenize = functools.cache(self._tokenize)

  def split(self, questions: Sequence[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """Splits questions into groups that fit."""
    groups, used = [[]], 0
    for question in questions:
      length = sum(map(len, self._tokenize(*question)[1:]))
      if used + length > self._question_slots:
        groups.append([])
        used = 0
      groups[-1].append(question)
      used += length
    return groups

  def pack(self, lessons: Sequence[Lesson]) -> Batch:
    """Packs one sequence a lesson, with as many of its questions as fit."""
    rows = [self._row(self.split(lesson.questions)[0]) for lesson in lessons]
    return Batch(
      pixel_values=jnp.asarray(self.pixel_values([lesson.picture for lesson in lessons])),
      **{name: jnp.asarray(np.stack([row[name] for row in rows])) for name in rows[0]},
    )

  def pixel_values(self, pictures: Sequence[Image.Image]) -> np.ndarray:
    """Preprocesses pictures, `[B, 3, h, w]`."""
    side = self._image_size
    return self._processor.image_processor(
      list(pictures), size={"shortest_edge": side}, crop_size={"height": side, "width": side}, return_tensors="np"
    )["pixel_values"]

  def _row(self, questions: Sequence[tuple[str, str]]) -> dict[str, np.ndarray]:
    system = self._tokenize(*questions[0])[0]
    prefix = len(system) + self._num_image_tokens
    tokens = system + [self._image_token] * self._num_image_tokens
    positions, segments = list(range(prefix)), [0] * prefix
    answer_slots, answers, answer_question = [], [], []
    for index, asked in enumerate(questions):
      _, question, answer = self._tokenize(*asked)
      first = len(tokens) + len(question) - 1
      answer_slots += range(first, first + len(answer))
      answers += answer
      answer_question += [index] * len(answer)
      tokens += question + answer
      positions += range(prefix, prefix + len(question) + len(answer))
      segments += [index + 1] * (len(question) + len(answer))
    num_slots = prefix + self._question_slots
    num_answers = self._question_slots // ANSWER_SLOTS_SHARE
    return {
      "tokens": _pad(tokens, num_slots, 0),
      "positions": _pad(positions, num_slots, 0),
      "segments": _pad(segments, num_slots, UNUSED),
      "image_start": np.int32(len(system)),
      "answer_slots": _pad(answer_slots, num_answers, 0),
      "answers": _pad(answers, num_answers, 0),
      "answer_valid": np.arange(num_answers) < len(answers),
      "answer_question": _pad(answer_question, num_answers, 0),
    }

  def _tokenize(self, question: str, answer: str) -> tuple[list[int], list[int], list[int]]:
    text = self._processor.apply_chat_template(
      [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}], add_generation_prompt=True
    )
    tokenizer = self._processor.tokenizer
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    image = prompt.index(self._image_token)
    answer_tokens = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return prompt[:image], prompt[image + 1 :], answer_tokens


def _pad(values: list[int], length: int, fill: int) -> np.ndarray:
  if len(values) > length:
    raise ValueError(f"{len(values)} values do not fit into {length} slots")
  return np.array(values + [fill] * (length - len(values)), np.int32)
