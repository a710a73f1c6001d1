"""Manipulated scores and contents: what is kept, and whose."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoints

from experiments.flow import importance
from experiments.question_sets import Question
from experiments.shared.subject import Subject
from himap_jax.engine.prefill import prefill
from himap_jax.errors import UserError
from himap_jax.pruning.config import build_schedule

pytestmark = pytest.mark.sampled(of="files of studies", by="file")

N, KEEP = 16, (6, 3)
PROMPTS = ("<s>USER: <image>\nWhat is it? ASSISTANT:", "<s>USER: <image>\nWhat is it? ASSISTANT:")


@pytest.fixture(scope="module")
def run(checkpoints, loaded, images):
  """Returns `run(schedule, images)`: the prefill of a pair."""
  tiny, model = checkpoints("dinov2_shrunk"), loaded("dinov2_shrunk").model
  keys = jax.random.split(jax.random.key(1), 2)
  compiled = jax.jit(
    lambda model, inputs, schedule: prefill(model.bind(), inputs, keys, schedule), static_argnames="schedule"
  )

  @functools.cache
  def call(schedule, pictures=(0, 1)):
    rows = [tiny.encode(images[index], prompt) for index, prompt in zip(pictures, PROMPTS, strict=True)]
    return compiled(model, jax.tree.map(jnp.asarray, tiny_checkpoints.pad_batch(rows, 72)), schedule)

  return call


@pytest.fixture(scope="module")
def own():
  return build_schedule("himap", num_layers=4, num_image_tokens=N, prune_layers=(1, 3), keep=KEEP)


def test_own_scores_are_himap_s(run, own):
  result, expected = run(importance.with_scores(own, "own")), run(own)
  np.testing.assert_array_equal(result.kept[0], expected.kept[0])
  np.testing.assert_array_equal(result.kept[1], expected.kept[1])
  np.testing.assert_allclose(result.logits, expected.logits, atol=1e-5)


def test_manipulated_scores(run, own):
  first = np.asarray(run(own).kept[0])
  np.testing.assert_array_equal(run(importance.with_scores(own, "partner's")).kept[0], first[::-1])
  wide = build_schedule("himap", num_layers=4, num_image_tokens=N, prune_layers=(1, 3), keep=(N - KEEP[0], 3))
  rest = np.asarray(run(importance.with_scores(wide, "reversed")).kept[0])
  for row in range(2):
    assert sorted([*first[row], *rest[row]]) == list(range(N))
  shuffled = np.asarray(run(importance.with_scores(own, "shuffled")).kept[0])
  assert (shuffled != first).any() and all(len(set(row)) == KEEP[0] for row in shuffled.tolist())


@pytest.mark.sampled
@pytest.mark.parametrize("chosen_by_partner", [True, False])
def test_a_partner_like_oneself_changes_nothing(run, own, chosen_by_partner):
  schedule = importance.with_partner_contents(own, chosen_by_partner=chosen_by_partner)
  np.testing.assert_allclose(run(schedule, (2, 2)).logits, run(own, (2, 2)).logits, atol=1e-5)
  result, expected = run(schedule), run(own)
  first = np.asarray(expected.kept[0])
  np.testing.assert_array_equal(result.kept[0], first[::-1] if chosen_by_partner else first)
  assert np.abs(result.logits - expected.logits).max() > 1e-2


def question(name, text, answer, image):
  return Question(name, image, text, answer, "kind", "")


def test_pairs():
  questions = [
    question("a", "one?", "x", "1.png"), question("b", "one?", "y", "2.png"), question("c", "one?", "x", "3.png"),
    question("d", "two?", "x", "1.png"), question("e", "two?", "x", "2.png"), question("f", "three?", "x", "1.png"),
    question("g", "three?", "y", "1.png"), question("h", "four?", "x", "1.png"), question("i", "four?", "z", "4.png"),
  ]  # fmt: skip
  pairs = importance.make_pairs(questions, 10, seed=0)
  assert [one.question for one, _ in pairs] == ["one?", "four?"]
  for one, other in pairs:
    assert one.question == other.question and one.answer != other.answer and one.image != other.image
  assert len(importance.make_pairs(questions, 1, seed=0)) == 1


def test_the_middle_is_swapped():
  first, second = np.zeros((1, 1, 3, 8, 12)), np.ones((1, 1, 3, 8, 12))
  mixed = importance.swapped(first, second, (4, 4))
  expected = np.zeros((8, 12))
  expected[2:6, 3:9] = 1
  np.testing.assert_array_equal(mixed[0, 0], np.stack([expected] * 3))
  assert not first.any()
  whole = importance.swapped(np.zeros((1, 1, 3, 54, 54)), np.ones((1, 1, 3, 54, 54)), (27, 27))[0, 0, 0]
  whole = whole.reshape(27, 2, 27, 2)
  by_patch = whole.mean(axis=(1, 3))  # a patch comes from one picture or from the other
  assert set(by_patch.ravel()) == {0, 1}
  inside = np.zeros((27, 27), bool)
  inside[importance.window_of((27, 27))] = True
  np.testing.assert_array_equal(by_patch, inside)


def test_what_cannot_be_asked_is_left_out():
  def example(asked):
    if asked.id in unreadable:
      raise UserError("unreadable")

  questions = [question(name, "?", "x", "1.png") for name in "abc"]
  batcher = types.SimpleNamespace(bucket=lambda example: 64)
  subject = types.SimpleNamespace(questions=questions, example=example, batcher=batcher)
  unreadable = {"b"}
  assert [q.id for q, *_ in Subject.examples(subject, "reading")] == ["a", "c"]
  unreadable = {"a", "b", "c"}
  with pytest.raises(UserError, match="none of the questions can be prepared"):
    list(Subject.examples(subject, "reading"))


def test_whose_answers():
  pairs = [tuple(question(name, "?", answer, name) for name, answer in zip(names, ("cat", "dog"), strict=True))
           for names in ("ab", "cd")]  # fmt: skip
  answers = {
    "no pruning": {"a": "cat", "b": "dog", "c": "cat", "d": "cow"},
    "partner's": {"a": "dog", "b": "cat", "c": "cow", "d": "dog"},
  }
  plain, swapped = importance.answer_rows(pairs, answers, seed=0)
  assert plain["right"] == 0.75 and plain["as the row's own picture unpruned"] == 1
  assert swapped["right"] == 0.25 and swapped["as the partner's picture unpruned"] == 0.75
  assert swapped["as the row's own picture unpruned"] == 0
