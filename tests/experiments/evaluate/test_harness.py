"""Responses that are kept for lmms-eval's tasks, and the table that is made of its results; see also tests/harness."""

import io

import PIL.Image
import pytest

from experiments.evaluate import report
from experiments.evaluate.harness import HarnessResults, HarnessRun, Recorded
from experiments.evaluate.scores import REFERENCE
from experiments.shared import geometries
from himap_jax import GenerationConfig, UserError
from himap_jax.engine.accounting import model_sizes
from himap_jax.harness.responder import Answer, Continuation, Loss, Question
from himap_jax.harness.settings import Settings
from himap_jax.pruning.schedule import Schedule


class Counting:
  """Answers with the text, and remembers what it was asked."""

  def __init__(self):
    self.asked = []

  def answers(self, questions):
    for question in questions:
      self.asked.append(question.text)
      yield question, Answer(question.text.upper(), 1, {"kept": []}, {"prefill_seconds": 1.0})

  def losses(self, continuations):
    for continuation in continuations:
      self.asked.append(continuation.target)
      yield continuation, Loss(float(len(continuation.target)), False)


def question(place, text, *, colour=0, max_new_tokens=8, stops=()):
  picture = PIL.Image.new("RGB", (4, 4), (colour, 0, 0))
  return Question(place, text, lambda: [picture], GenerationConfig(max_new_tokens), stops)


def recorded(path, responder, **subject):
  return Recorded(path / "answers.jsonl", {"checkpoint": "a", **subject}, Settings(), responder)


def test_responses_are_kept(tmp_path):
  first, questions = Counting(), [question(0, "a"), question(1, "b")]
  given = [(own.place, answer) for own, answer in recorded(tmp_path, first).answers(questions)]
  assert [answer.text for _, answer in given] == ["A", "B"] and first.asked == ["a", "b"]
  again = recorded(tmp_path, None)
  assert [(own.place, answer) for own, answer in again.answers(questions)] == given and len(again.used) == 2
  more = Counting()
  answers = recorded(tmp_path, more).answers([*questions, question(2, "c")])
  assert sorted(answer.text for _, answer in answers) == ["A", "B", "C"] and more.asked == ["c"]


@pytest.mark.parametrize("changed", [{"text": "b"}, {"colour": 9}, {"max_new_tokens": 4}, {"stops": (".",)}])
def test_changed_requests_are_asked_anew(tmp_path, changed):
  list(recorded(tmp_path, Counting()).answers([question(0, "a")]))
  responder = Counting()
  list(recorded(tmp_path, responder).answers([question(0, **{"text": "a"} | changed)]))
  assert len(responder.asked) == 1


def test_a_palette_belongs_to_a_picture(tmp_path):
  asked = []
  for colour in ("red", "blue", "red"):
    picture, responder = PIL.Image.new("RGB", (4, 4), colour).quantize(2), Counting()
    assert not any(picture.tobytes())
    list(recorded(tmp_path, responder).answers([Question(0, "a", lambda own=picture: [own], GenerationConfig(8))]))
    asked += responder.asked
  assert asked == ["a", "a"]


def test_another_subject_is_asked_anew(tmp_path):
  list(recorded(tmp_path, Counting()).answers([question(0, "a")]))
  responder = Counting()
  list(recorded(tmp_path, responder, checkpoint="b").answers([question(0, "a")]))
  assert responder.asked == ["a"]


def test_losses_are_kept(tmp_path):
  choices = [Continuation(place, "q", list, target, "q") for place, target in enumerate(("cat", "a dog"))]
  given = list(recorded(tmp_path, Counting()).losses(choices))
  assert [loss for _, loss in given] == [Loss(3.0, False), Loss(5.0, False)]
  assert list(recorded(tmp_path, None).losses(choices)) == given


def test_a_torn_file_is_asked_for_the_rest(tmp_path):
  questions = [question(0, "a"), question(1, "b")]
  list(recorded(tmp_path, Counting()).answers(questions))
  path = tmp_path / "answers.jsonl"
  path.write_bytes(path.read_bytes()[:-20])
  responder = Counting()
  assert len(list(recorded(tmp_path, responder).answers(questions))) == 2 and responder.asked == ["b"]


def test_missing_responses_without_a_model(tmp_path):
  with pytest.raises(UserError, match="--score_only: .* lacks 1 of 1 answers"):
    list(recorded(tmp_path, None).answers([question(0, "a")]))


def test_pictures_that_cannot_be_read_are_the_responder_s_to_report(tmp_path):
  file = io.BytesIO()
  PIL.Image.new("RGB", (200, 200)).save(file, "JPEG")
  unreadable = (
    lambda: [PIL.Image.open(io.BytesIO(b"no picture"))],
    lambda: [PIL.Image.open(io.BytesIO(file.getvalue()[:700]))],
    lambda: ["video.mp4"],
  )
  for place, pictures in enumerate(unreadable):
    responder = Counting()
    list(recorded(tmp_path, responder).answers([Question(place, "a", pictures, GenerationConfig(8))]))
    assert responder.asked == ["a"]


def test_requests_that_cannot_be_answered(tmp_path):
  """They are left out also without a model, and asked again with one; errors of other requests stay in the file."""

  class Failing(Counting):
    """Cannot answer the first."""

    def answers(self, questions):
      yield from list(super().answers(questions))[1:]

  questions, other = [question(0, "a"), question(1, "b")], [question(2, "c"), question(3, "d")]

  def places(responder, asked=questions):
    return [own.place for own, _ in recorded(tmp_path, responder).answers(asked)]

  assert places(Failing()) == [1] and places(Failing(), other) == [3]
  assert places(None) == [1] and places(None, other) == [3]
  responder = Failing()
  assert places(responder) == [1] and responder.asked == ["a"] and places(None) == [1]
  assert sorted(places(Counting())) == sorted(places(None)) == [0, 1]
  assert places(None, other) == [3]


def test_choices_agree_in_the_likeliest():
  """However the losses differ; other responses agree in all that they are."""

  def run(*responses):
    return HarnessRun({"task": {"acc,none": 0.5}}, {"task": [{"filtered_resps": own} for own in responses]}, [])

  runs = {
    REFERENCE: run([(1.0, False), (2.0, False)], [(3.0, True), (2.0, False)], ["cat"], [(1.0, True)]),
    "other": run([(1.5, True), (1.75, True)], [(1.0, True), (2.0, False)], ["cat"], [(1.0, False)]),
  }
  sizes = model_sizes(geometries.model_of("demo"), (336, 336))
  plain, other = HarnessResults(runs, dict.fromkeys(runs, Schedule()), sizes).rows()
  assert plain["agreement"] == 1 and other["agreement"] == 0.5


def test_the_table_is_paired():
  """Intervals exist where a score is the mean over samples; settings that answer alike differ by exactly zero."""
  right = [float(n % 3 > 0) for n in range(30)]
  samples = [{"filtered_resps": [str(n)], "acc": value, "f1": {"tp": n}} for n, value in enumerate(right)]
  results = {"task": {"alias": "task", "acc,none": sum(right) / 30, "acc_stderr,none": 0.1, "f1,none": 0.7}}
  run = HarnessRun(results, {"task": samples}, [])
  worse = HarnessRun({"task": {"acc,none": 0.0, "f1,none": 0.2}}, {"task": [s | {"acc": 0.0} for s in samples]}, [])
  sizes = model_sizes(geometries.model_of("demo"), (336, 336))
  runs = {REFERENCE: run, "same": run, "worse": worse}
  plain, same, other = HarnessResults(runs, dict.fromkeys(runs, Schedule()), sizes).rows()
  assert plain["score"] == pytest.approx(2 / 3) and plain["score_low"] < 2 / 3 < plain["score_high"]
  assert same["difference"] == same["difference_low"] == same["difference_high"] == 0 and same["agreement"] == 1
  assert other["difference_high"] < 0 and other["task: f1"] == 0.2 and plain["task"] == "lmms:task"
  corpus = HarnessRun({"task": {"f1,none": 0.7}}, {"task": samples}, [])  # a score that is not a mean
  (row,) = HarnessResults({REFERENCE: corpus}, {REFERENCE: Schedule()}, sizes).rows()
  assert row["score"] == 0.7 and "score_low" not in row
  assert "| lmms:task | none | 30 | 0.7 | +0 |" in "\n".join(report.summary([row], []))
