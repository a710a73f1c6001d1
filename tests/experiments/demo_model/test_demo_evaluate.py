"""The evaluation counts a question as right where every token of its answer is predicted, and resumes."""

import json

import jax
import jax.numpy as jnp
import pytest

from experiments.demo_model import evaluate
from experiments.question_sets import Question


@pytest.fixture
def questions(images, tmp_path):
  for number, image in enumerate(images[:2]):
    image.save(tmp_path / f"{number}.png")
  return [Question(str(n), tmp_path / f"{n // 3}.png", "Why?", f"answer {n}", "why", "") for n in range(5)]


def test_right_and_wrong_and_resumed(loaded, questions, tmp_path, monkeypatch):
  def all_but_one_token(model, updates, batch):
    """Logits that predict every answer, but for the second token of the second question of each image."""
    second = (batch.answer_question == 1) & (jnp.roll(batch.answer_question, 1, axis=1) == 1)
    wrong = second & (jnp.roll(batch.answer_question, 2, axis=1) != 1)
    return jax.nn.one_hot(jnp.where(wrong, 0, batch.answers), 272)

  results, model = tmp_path / "right.jsonl", loaded("clip_mha")
  monkeypatch.setattr(evaluate, "answer_logits", all_but_one_token)
  expected = {"0": True, "1": False, "2": True, "3": True, "4": False}
  assert evaluate.right_answers(model, questions, results) == expected
  rows = results.read_text().splitlines()
  assert {row["id"]: row["right"] for row in map(json.loads, rows)} == expected
  results.write_text("\n".join(rows[:3]) + "\n")
  assert evaluate.right_answers(model, questions, results) == expected
  assert results.read_text().splitlines() == rows
  monkeypatch.setattr(evaluate, "answer_logits", lambda *_: pytest.fail("evaluated again"))
  assert evaluate.right_answers(model, questions, results) == expected
