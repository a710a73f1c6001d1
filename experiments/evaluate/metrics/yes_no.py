"""Scores of yes-or-no questions: MME's accuracy and accuracy+, POPE's F1."""

import collections
from collections.abc import Iterable, Sequence

import numpy as np

PERCEPTION = (
  "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def mme_answer(answer: str) -> str:
  """`yes` or `no` if an answer begins so within four characters, else `other`; by MME's `calculation.py`."""
  start = answer.lower().strip()[:4]
  return "yes" if "yes" in start else "no" if "no" in start else "other"


def mme_scores(rows: Iterable[tuple[str, str, float]]) -> dict[str, float]:
  """MME's scores (Fu et al. 2023) by category, from rows of category, picture, and 1 for a right answer or 0.

  A category's score is accuracy + accuracy+, of at most 200: the share of right answers, and of pictures with both
  answers right, in percent. Pictures of which only one question was answered are left out.
  """
  pictures = collections.defaultdict(list)
  for category, picture, right in rows:
    pictures[category, picture].append(right)
  categories = collections.defaultdict(list)
  for (category, _), right in pictures.items():
    if len(right) == 2:
      categories[category].append(100 * (sum(right) / 2 + (sum(right) == 2)))
  return {category: sum(own) / len(own) for category, own in categories.items()}


def pope_answer(answer: str) -> str:
  """`no` if the first sentence has the word No, no or not, else `yes`; by LLaVA's `eval_pope.py` (and POPE's own)."""
  words = answer.split(".")[0].replace(",", "").split(" ")
  return "no" if {"No", "no", "not"} & set(words) else "yes"


def pope_scores(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
  """POPE's scores (Li et al. 2023) of one category in percent: F1, accuracy, precision and recall of yes, share of yes.

  Both arguments hold `yes` and `no`. F1, precision and recall are 0 where they are undefined.
  """
  given, wanted = np.array(answers) == "yes", np.array(references) == "yes"
  hits = int((given & wanted).sum())
  figures = {
    "F1": 2 * hits / max(int(given.sum() + wanted.sum()), 1),
    "accuracy": float((given == wanted).mean()),
    "precision": hits / max(int(given.sum()), 1),
    "recall": hits / max(int(wanted.sum()), 1),
    "share of yes": float(given.mean()),
  }
  return {name: 100 * value for name, value in figures.items()}
