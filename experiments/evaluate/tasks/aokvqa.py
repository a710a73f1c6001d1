"""A-OKVQA (Schwenk et al. 2022): validation, as multiple choice and with direct answers."""

import ast
import dataclasses
from collections.abc import Sequence

from experiments.evaluate.metrics.choice import LETTERS, lettered, nearest_letter
from experiments.evaluate.metrics.text import direct_answer
from experiments.evaluate.tasks.prompts import SHORT, choice_question
from experiments.evaluate.tasks.task import Known, Record, Sample, Scored, Task


def _choice(record: Record) -> Sample:
  options, answer = lettered(record["choices"]), record.get("correct_choice_idx")
  return Sample(
    str(record["question_id"]),
    (record["image"],),
    choice_question(record["question"], options),
    () if answer is None else (LETTERS[answer],),
    options,
  )


def _direct(record: Record) -> Sample:
  answers = record.get("direct_answers") or ()
  if isinstance(answers, str):  # The hub's version holds the list as Python writes it.
    answers = ast.literal_eval(answers)
  return Sample(str(record["question_id"]), (record["image"],), record["question"] + SHORT, tuple(answers))


def _plain(answer: str) -> str:
  return answer.strip().rstrip(".").lower()


def _submission(kind: str, scored: Sequence[Scored]) -> dict[str, dict[str, str]]:
  """The leaderboard's form; a choice is the option's text."""
  rows = {}
  for sample, answer, _ in scored:
    options = sample.options
    rows[sample.id] = {kind: options[nearest_letter(answer or "", options)] if options else _plain(answer or "")}
  return rows


AOKVQA = Task(
  name="aokvqa",
  title="A-OKVQA val, multiple choice",
  repository="HuggingFaceM4/A-OKVQA",
  config=None,
  split="validation",
  columns=("image", "question_id", "question", "choices"),
  sample=_choice,
  score=lambda answer, sample: float(nearest_letter(answer, sample.options) == sample.references[0]),
  max_new_tokens=16,
  known={"LLaVA-1.5-7B": Known(76.8, "FastV's README, with a prompt of its own")},
  submission=lambda scored: _submission("multiple_choice", scored),
)
AOKVQA_DIRECT = dataclasses.replace(
  AOKVQA,
  name="aokvqa_direct",
  title="A-OKVQA val, direct answer",
  columns=("image", "question_id", "question", "difficult_direct_answer"),
  sample=_direct,
  score=lambda answer, sample: direct_answer(_plain(answer), sample.references),
  known={},
  keeps=lambda record: not record["difficult_direct_answer"],
  submission=lambda scored: _submission("direct_answer", scored),
)
