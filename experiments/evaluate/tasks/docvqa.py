"""DocVQA (Mathew et al. 2021): validation, and test as a submission."""

import dataclasses
from collections.abc import Sequence

from experiments.evaluate.metrics.text import anls
from experiments.evaluate.tasks.prompts import SHORT
from experiments.evaluate.tasks.task import Known, Record, Sample, Scored, Task, mean


def _sample(record: Record) -> Sample:
  return Sample(
    str(record["questionId"]),
    (record["image"],),
    record["question"] + SHORT,
    tuple(record.get("answers") or ()),
    number=int(record["questionId"]),
  )


def _submission(scored: Sequence[Scored]) -> list[dict[str, int | str]]:
  """The form of the Robust Reading Competition's server."""
  return [{"questionId": one.sample.number, "answer": one.answer or ""} for one in scored]


DOCVQA = Task(
  name="docvqa",
  title="DocVQA val",
  repository="lmms-lab/DocVQA",
  config="DocVQA",
  split="validation",
  columns=("questionId", "question", "image"),
  sample=_sample,
  score=lambda answer, sample: anls(answer, sample.references),
  max_new_tokens=32,
  metric="ANLS",
  aggregate=lambda scored: mean(scored, "ANLS"),
  known={"LLaVA-1.5-7B": Known(28.1, "lmms-eval's results, from memory")},
  submission=_submission,
)
DOCVQA_TEST = dataclasses.replace(DOCVQA, name="docvqa_test", title="DocVQA test", split="test", known={})
