"""Two cells compared with each other, on all questions or on some types."""

import itertools
import pathlib

import commands
import numpy as np
import pytest

from experiments.compare import tables
from experiments.compare.comparison import Comparison, Pair, parse_pair
from experiments.compare.grid import Cell
from experiments.compare.prompt_sizes import PromptSizes
from experiments.question_sets import Question
from himap_jax.errors import UserError
from himap_jax.pruning.schedule import Schedule

LABELS = ("none", "himap@1/4 64", "random 64", "never 64")
CELLS = [Cell(label, label, schedule=Schedule()) for label in LABELS[:3]] + [Cell("never", "never 64", note="cannot")]
# Two questions about each of ten pictures, one of every type.
QUESTIONS = [
  Question(f"{number}{type}", pathlib.Path(f"{number}.png"), "q", "yes", type, "")
  for number in range(10)
  for type in ("tiny", "word")
]


def comparison_of(**right):
  """Cells that answer so many questions of each type right, the first ones."""
  answers = {
    label: {q.id: {"answer": "yes" if index // 2 < count[q.type] else "no"} for index, q in enumerate(QUESTIONS)}
    for label, count in right.items()
  }
  return Comparison(QUESTIONS, CELLS, answers, {}, PromptSizes(None, 16, 4))


def p_value(differences):
  """Exact, over all signs."""
  sums = [abs(np.dot(signs, differences)) for signs in itertools.product((-1, 1), repeat=len(differences))]
  return np.mean([value >= abs(sum(differences)) - 1e-9 for value in sums])


def test_differences_intervals_and_corrected_tests():
  one, other = {"tiny": 9, "word": 5}, {"tiny": 2, "word": 5}
  comparison = comparison_of(**{"himap@1/4 64": one, "random 64": other})
  all_, tiny, word = comparison.pairs(
    [Pair(*LABELS[1:3]), Pair(*LABELS[1:3], ("tiny",)), Pair(*LABELS[1:3], ("word",))], seed=0
  )
  assert (all_["questions"], tiny["questions"], word["questions"]) == (20, 10, 10)
  assert (all_["accuracy"], all_["its_accuracy"]) == (14 / 20, 7 / 20)
  assert (all_["difference"], tiny["difference"], word["difference"]) == pytest.approx((0.35, 0.7, 0.0))
  assert 0 < tiny["difference_low"] <= 0.7 <= tiny["difference_high"] <= 1
  assert word["difference_low"] == word["difference_high"] == 0
  exact = p_value([1] * 7 + [0] * 3)
  assert all_["p"] == tiny["p"] == pytest.approx(3 * exact, abs=0.01) and word["p"] == 1
  *_, line = tables.pairs([tiny]).splitlines()
  assert line.startswith("| himap@1/4 64 | random 64 | 10 (tiny) | 90.0% | 20.0% | +70.0 | +")


def test_pairs_are_read():
  assert parse_pair("himap@1/4 64 ~ random 64", CELLS, QUESTIONS) == Pair("himap@1/4 64", "random 64")
  assert parse_pair("none~random 64 in word/tiny", CELLS, QUESTIONS) == Pair("none", "random 64", ("word", "tiny"))
  for text, message in (
    ("none", "'none' is not two cells"),
    ("none~himap 64", "no cell 'himap 64'; there are: none, himap@1/4 64, random 64$"),
    ("none~never 64", "no cell 'never 64'"),
    ("none~random 64 in sheet", "no questions of type 'sheet'; there are: tiny, word"),
  ):
    with pytest.raises(UserError, match=message):
      parse_pair(text, CELLS, QUESTIONS)


def test_a_pair_that_is_none_is_refused_before_anything_is_read(tmp_path):
  refused = commands.Command(
    "experiments.compare", "--pairs=foo", "--question_set=/nowhere", f"--workdir={tmp_path}", f"--output={tmp_path}"
  )
  assert refused.communicate()[1].startswith("compare: --pairs: 'foo' is not two cells")
