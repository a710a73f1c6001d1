"""The evaluation runs the same command as everyone, and counts what it answers."""

import json

import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import evaluate_demo
from experiments.question_sets import Question


@pytest.fixture
def answered(tmp_path, loaded, images):
  """Returns `answered(questions)`: which of them the model answers right; its own answers are in `none.jsonl`."""
  images[0].save(tmp_path / "0.png")
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()

  def run(answers):
    questions = [Question(name, tmp_path / "0.png", "Why?", answer, "why", "") for name, answer in answers.items()]
    given = {"checkpoint": str(loaded("clip_mha").directory), "dtype": "float32", "compilation_cache_dir": ""}
    with flagsaver.flagsaver(**given):
      return evaluate_demo.method_right("none", questions, tmp_path)

  return run


def test_right_and_wrong(answered, tmp_path):
  assert answered({"a": "no such answer", "b": "nor this"}) == {"a": False, "b": False}
  rows = map(json.loads, (tmp_path / "none.jsonl").read_text().splitlines())
  given = {row["id"]: row["answer"] for row in rows}
  assert answered({"a": given["a"], "b": "nor this"}) == {"a": True, "b": False}
