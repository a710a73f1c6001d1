"""Questions about pictures with their answers: easy-VQA, composed scenes and lists of what is in them, or a file."""

import collections
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from checkpoints_convert.demo import easyvqa
from experiments import scenes
from experiments.demo_data import question_only_answers
from himap_jax.checkpoint import default_cache_dir

NUM_SCENES = 200
SHAPES = frozenset({"circle", "rectangle", "triangle"})


class Question(NamedTuple):
  """One question about one picture.

  Attributes:
    id: unique in its set.
    image: the picture's file.
    question: its text.
    answer: the true answer.
    type: what kind of question it is.
    guess: what can be answered without the picture; empty where nothing can.
  """

  id: str
  image: pathlib.Path
  question: str
  answer: str
  type: str
  guess: str


def is_right(answer: str | None, truth: str | None) -> bool:
  """Whether two answers are equal but for surrounding space, case and a final period; no answer is never right."""
  return answer is not None and truth is not None and _normal(answer) == _normal(truth)


def score(answer: str | None, truth: str | None) -> float:
  """How much of a list of items an answer has in its order: the F-measure of their longest common subsequence.

  This is ROUGE-L (Lin 2004) of items, which commas separate. A truth of one item makes it 1 where the answer is right and, where
  the answer is one item too, 0 where it is not.
  """
  if answer is None or truth is None:
    return 0.0
  given, wanted = ([_normal(item) for item in text.split(",")] for text in (answer, truth))
  longest = np.zeros((len(given) + 1, len(wanted) + 1), int)
  for i, one in enumerate(given):
    for j, other in enumerate(wanted):
      longest[i + 1, j + 1] = longest[i, j] + 1 if one == other else max(longest[i, j + 1], longest[i + 1, j])
  return float(2 * longest[-1, -1] / (len(given) + len(wanted)))


def _normal(answer: str) -> str:
  return answer.strip().lower().removesuffix(".").strip()


def load(
  name: str, *, num_questions: int | None, seed: int, workdir: pathlib.Path, needs_answers: bool = True
) -> list[Question]:
  """Loads a question set, or as many of its questions, each type in proportion.

  Args:
    name: a name in `SETS`, or a JSONL file of `{"id", "image", "question", "answer", "type"}` a line, images relative to
      it; a row without `guess` is guessed as `guess_from_other_half` does. Where answers are not needed, rows may lack them
      and the type.
    num_questions: how many to draw; all when None.
    seed: of the draw.
    workdir: where a set that has to be made is written.
    needs_answers: whether a row of a file without an answer is an error.

  Raises:
    ValueError: there is no such set, or it cannot be read.
  """
  questions = SETS[name](workdir) if name in SETS else _read(name, needs_answers=needs_answers)
  return questions if num_questions is None else draw(questions, num_questions, seed=seed)


def digest(questions: Sequence[Question]) -> str:
  """What results about questions depend on: their texts, and the contents of the pictures that can be read."""
  result = hashlib.sha256()
  for question in questions:
    result.update(json.dumps(question._replace(image="")).encode())
    if question.image.is_file():
      result.update(hashlib.sha256(question.image.read_bytes()).digest())
  return result.hexdigest()


def draw(questions: Sequence[Question], num_questions: int, *, seed: int) -> list[Question]:
  """Draws questions, each type in proportion, and keeps their order."""
  rng = np.random.default_rng(seed)
  places = collections.defaultdict(list)
  for place, question in enumerate(questions):
    places[question.type].append(place)
  exact = {type: min(1.0, num_questions / len(questions)) * len(own) for type, own in places.items()}
  counts = {type: int(share) for type, share in exact.items()}
  missing = min(num_questions, len(questions)) - sum(counts.values())
  for type in sorted(exact, key=lambda type: counts[type] - exact[type])[:missing]:
    counts[type] += 1
  drawn = [rng.choice(own, counts[type], replace=False) for type, own in places.items()]
  return [questions[place] for place in sorted(np.concatenate(drawn).tolist())]


def guess_from_other_half(asked: Sequence[tuple[str, str, str, str]]) -> list[str]:
  """What could be answered without the picture: the commonest answer in the half of the pictures that a row is not in.

  Every other picture is in one half. Leaving only the row itself out would make the rarer answer of a balanced set the
  commonest of what is left.

  Args:
    asked: image, question, type and answer of every row.

  Returns:
    For every row the commonest answer to its question in the other half, else to its type, else nothing.
  """
  halves = {image: index % 2 for index, image in enumerate(dict.fromkeys(image for image, *_ in asked))}
  counts = collections.defaultdict(collections.Counter)
  for image, question, type, answer in asked:
    counts[halves[image], "question", question][answer] += 1
    counts[halves[image], "type", type][answer] += 1
  guesses = []
  for image, question, type, _ in asked:
    other = 1 - halves[image]
    seen = counts[other, "question", question] or counts[other, "type", type]
    guesses.append(seen.most_common(1)[0][0] if seen else "")
  return guesses


def _easyvqa(workdir: pathlib.Path) -> list[Question]:
  del workdir
  guesses = question_only_answers(easyvqa.load(default_cache_dir(), "train"))
  return [
    Question(
      id=example.id,
      image=example.image,
      question=example.question,
      answer=example.answer,
      type="yes or no" if example.answer in ("yes", "no") else "shape" if example.answer in SHAPES else "colour",
      guess=guesses.get(example.question, ""),
    )
    for example in easyvqa.load(default_cache_dir(), "test")
  ]


def _scenes(workdir: pathlib.Path, *, lists: bool = False) -> list[Question]:
  path = workdir / ("scene_lists" if lists else "scenes") / "questions.jsonl"
  if not path.exists():
    scenes.write(path.parent, "test", NUM_SCENES, lists=lists)
  return _read(str(path), needs_answers=True)


def _read(name: str, *, needs_answers: bool) -> list[Question]:
  absent = {} if needs_answers else {"answer": "", "type": "question"}
  path = pathlib.Path(name)
  try:
    lines = path.read_text(encoding="utf-8").splitlines()
  except OSError as error:
    known = ", ".join(SETS)
    raise ValueError(f"{name}: neither a question set ({known}) nor a file that can be read") from error
  rows = []
  for number, line in enumerate(lines, start=1):
    try:
      row = absent | json.loads(line)
      rows.append({field: str(row[field]) for field in ("id", "image", "question", "answer", "type")})
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(f"{path}: line {number} is not a question with its answer ({error})") from error
    rows[-1]["guess"] = row.get("guess")
  if len({row["id"] for row in rows}) < len(rows) or not rows:
    raise ValueError(f"{path}: {'two questions share an id' if rows else 'no questions'}")
  guesses = guess_from_other_half([(row["image"], row["question"], row["type"], row["answer"]) for row in rows])
  return [
    Question(
      **row | {"image": path.parent / row["image"], "guess": guess if row["guess"] is None else str(row["guess"])}
    )
    for row, guess in zip(rows, guesses, strict=True)
  ]


SETS: dict[str, Callable[[pathlib.Path], list[Question]]] = {
  "easyvqa": _easyvqa,
  "scenes": _scenes,
  "scene_lists": functools.partial(_scenes, lists=True),
}
