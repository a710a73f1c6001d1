"""Question sets: files, draws, question-only answers, and how an answer is scored."""

import collections
import itertools
import json
import pathlib

import numpy as np
import pytest

from experiments import question_sets
from experiments.question_sets import Question, is_right


def question(index, type="t", text="q", answer="a", guess=""):
  return Question(str(index), pathlib.Path(f"{index}.png"), text, answer, type, guess)


def test_results_belong_to_questions_and_pictures(tmp_path):
  path = tmp_path / "a.png"
  path.write_bytes(b"one")
  asked = [Question("a", path, "Why?", "x", "why", ""), Question("b", tmp_path / "b.png", "Why?", "x", "why", "")]
  first = question_sets.digest(asked)
  assert first == question_sets.digest(asked)
  assert first != question_sets.digest(asked[:1])
  assert first != question_sets.digest([asked[0], asked[1]._replace(question="Who?")])
  path.write_bytes(b"other")
  other = question_sets.digest(asked)
  (tmp_path / "b.png").write_bytes(b"repaired")
  assert len({first, other, question_sets.digest(asked)}) == 3


def test_draw_keeps_proportions_and_order():
  questions = [question(i, type="abbcccdddd"[i % 10]) for i in range(200)]
  drawn = question_sets.draw(questions, 50, seed=0)
  assert collections.Counter(q.type for q in drawn) == {"a": 5, "b": 10, "c": 15, "d": 20}
  assert [int(q.id) for q in drawn] == sorted(int(q.id) for q in drawn)
  assert drawn == question_sets.draw(questions, 50, seed=0) != question_sets.draw(questions, 50, seed=1)
  for count in (1, 7, 33, 199):
    assert len(question_sets.draw(questions, count, seed=0)) == count
  assert question_sets.draw(questions, 900, seed=0) == questions


def test_guesses_against_a_slow_loop():
  rng = np.random.default_rng(0)
  asked = [(i // 3, f"q{rng.integers(9)}", f"t{rng.integers(3)}", f"a{rng.integers(4)}") for i in range(60)]
  asked.append((0, "x", "y", "z"))
  for index, guess in enumerate(question_sets.guess_from_other_half(asked)):
    others = [other for other in asked if (other[0] - asked[index][0]) % 2]
    for field in (1, 2):
      counts = collections.Counter(other[3] for other in others if other[field] == asked[index][field])
      if counts:
        assert counts[guess] == max(counts.values())
        break
    else:
      assert guess == ""


def test_a_balanced_set_is_guessed_as_often_as_it_should_be():
  answers = np.random.default_rng(0).permutation(["yes", "no"] * 200).tolist()
  asked = [(index, f"question {index}", "yes or no", answer) for index, answer in enumerate(answers)]
  guesses = question_sets.guess_from_other_half(asked)
  assert 0.4 < np.mean([guess == answer for guess, answer in zip(guesses, answers, strict=True)]) < 0.6


@pytest.mark.parametrize("answer, truth, expected", [
  (" Red. ", "red", True), ("red", "Red.", True), ("red..", "red", False), ("reddish", "red", False), ("", ".", True), (None, "red", False), (None, None, False),
])  # fmt: skip
def test_is_right(answer, truth, expected):
  assert is_right(answer, truth) == expected


@pytest.mark.parametrize("answer, truth", [
  ("a, b, c", "a, b, c"), ("A,b.", "a, b, c"), ("c, b, a", "a, b, c"), ("b, a, b, c", "a, b, b"), ("x", "a, b"), ("a, b", "a"), ("", "a"), ("red", "Red."),
])  # fmt: skip
def test_lists_are_scored_by_what_they_share_in_order(answer, truth):
  given, wanted = ([item.strip(" .").lower() for item in text.split(",")] for text in (answer, truth))

  def ordered(items):
    return {part for size in range(len(items) + 1) for part in itertools.combinations(items, size)}

  longest = max(map(len, ordered(given) & ordered(wanted)))
  precision, recall = longest / len(given), longest / len(wanted)
  expected = 2 * precision * recall / (precision + recall) if longest else 0.0
  assert question_sets.score(answer, truth) == pytest.approx(expected)
  assert question_sets.score(None, truth) == question_sets.score(answer, None) == 0


def test_question_files(tmp_path):
  path = tmp_path / "questions.jsonl"
  rows = [
    {"id": 1, "image": "a.png", "question": "q", "answer": "x", "type": "t"},
    {"id": 2, "image": "a.png", "question": "q", "answer": "y", "type": "t"},
    {"id": 3, "image": "b.png", "question": "q", "answer": "y", "type": "t", "guess": "z"},
  ]
  load = lambda: question_sets.load(str(path), num_questions=None, seed=0, workdir=tmp_path)  # noqa: E731
  write_rows(path, rows)
  loaded = load()
  assert [q.guess for q in loaded] == ["y", "y", "z"]
  assert loaded[0].id == "1" and loaded[0].image == tmp_path / "a.png"
  for bad, message in (([rows[0], {"id": 4}], "line 2"), ([rows[0], rows[0]], "share an id"), ([], "no questions")):
    write_rows(path, bad)
    with pytest.raises(ValueError, match=message):
      load()
  with pytest.raises(ValueError, match="neither a question set"):
    question_sets.load("nowhere", num_questions=None, seed=0, workdir=tmp_path)


def write_rows(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
