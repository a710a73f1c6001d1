"""Question sets about pictures: easy-VQA, generated sets, or a JSONL file."""

import collections
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from checkpoints_convert.demo import easyvqa
from experiments.demo_model import questions as scene_questions
from experiments.demo_model import sets
from himap_jax.checkpoint import default_cache_dir
from himap_jax.errors import UserError

NUM_SCENES = {"scenes": 200, "lists": 200, "details": 1050}  # of generated sets
SETS = ("easyvqa", *NUM_SCENES)


class Question(NamedTuple):
  """A question with its true answer.

  Attributes:
    guess: the answer suggested by the question alone, empty where unknown.
    size: of what is asked for, in image tokens, if it is known.
  """

  id: str
  image: pathlib.Path
  question: str
  answer: str
  type: str
  guess: str
  size: float | None = None


def is_right(answer: str | None, truth: str | None) -> bool:
  """Whether two answers are equal up to surrounding space, case and a final period; None is never right."""
  return answer is not None and truth is not None and _normal(answer) == _normal(truth)


def score(answer: str | None, truth: str | None) -> float:
  """ROUGE-L (Lin 2004) of two comma-separated lists: the F-measure of their longest common subsequence of items."""
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
  """Loads one of `SETS`, or a JSONL file.

  A file has `{"id", "image", "question", "answer", "type"}` per line, with image paths relative to it, and possibly
  `size`; without `needs_answers`, answer and type may be missing. Rows without `guess` get one from
  `guess_from_other_half`.
  `num_questions` are drawn, all if None. Generated sets are written to `workdir`. Raises `UserError` if the set does
  not exist or cannot be read.
  """
  if name == "easyvqa":
    questions = _easyvqa()
  elif name in SETS:
    path = workdir / name / "questions.jsonl"
    if not path.exists():
      sets.write(path.parent, name, "test", NUM_SCENES[name])
    questions = _read(path, needs_answers=True)
  else:
    questions = _read(pathlib.Path(name), needs_answers=needs_answers)
  return questions if num_questions is None else draw(questions, num_questions, seed=seed)


def digest(questions: Sequence[Question]) -> str:
  """Digest of all that results depend on: the questions' texts and the readable pictures."""
  result = hashlib.sha256()
  for question in questions:
    result.update(json.dumps(question._replace(image="")).encode())
    if question.image.is_file():
      result.update(hashlib.sha256(question.image.read_bytes()).digest())
  return result.hexdigest()


def draw(questions: Sequence[Question], num_questions: int, *, seed: int) -> list[Question]:
  """Draws questions, each type in proportion, in their original order."""
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
  """Question-only answers to rows (image, question, type, answer), from the half of the pictures without the row's own.

  A guess is the most common answer there to the question, else to its type, else empty. The halves are alternate
  pictures; leaving out only the row itself would make the rarer answer of a balanced set the most common of the rest.
  """
  halves = {image: index % 2 for index, image in enumerate(dict.fromkeys(image for image, *_ in asked))}
  keys = [(("question", question), ("type", type)) for _, question, type, _ in asked]
  seen = scene_questions.commonest(
    ((halves[row[0]], key), row[-1]) for row, own in zip(asked, keys, strict=True) for key in own
  )
  others = [1 - halves[image] for image, *_ in asked]
  return [seen.get((half, q), seen.get((half, type), "")) for half, (q, type) in zip(others, keys, strict=True)]


def _easyvqa() -> list[Question]:
  train = easyvqa.load(default_cache_dir(), "train")
  guesses = scene_questions.commonest((example.question, example.answer) for example in train)
  types = {"yes": "yes or no", "no": "yes or no"} | dict.fromkeys(("circle", "rectangle", "triangle"), "shape")
  return [
    Question(id, image, question, answer, types.get(answer, "colour"), guesses.get(question, ""))
    for image, question, answer, id in easyvqa.load(default_cache_dir(), "test")
  ]


def _read(path: pathlib.Path, *, needs_answers: bool) -> list[Question]:
  absent = {} if needs_answers else {"answer": "", "type": "question"}
  try:
    lines = path.read_text(encoding="utf-8").splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"{path}: neither a question set ({', '.join(SETS)}) nor a file that can be read") from error
  rows, guesses, sizes = [], [], []
  for number, line in enumerate(lines, start=1):
    try:
      row = absent | json.loads(line)
      rows.append([str(row[field]) for field in ("id", "image", "question", "answer", "type")])
      sizes.append(None if row.get("size") is None else float(row["size"]))
    except (ValueError, KeyError, TypeError) as error:
      raise UserError(f"{path}: line {number} is not a question with its answer ({error})") from error
    guesses.append(row.get("guess"))
  if len({id for id, *_ in rows}) < len(rows) or not rows:
    raise UserError(f"{path}: {'two questions share an id' if rows else 'no questions'}")
  others = guess_from_other_half([(image, question, type, answer) for _, image, question, answer, type in rows])
  return [
    Question(id, path.parent / image, *texts, other if guess is None else str(guess), size)
    for (id, image, *texts), guess, other, size in zip(rows, guesses, others, sizes, strict=True)
  ]
