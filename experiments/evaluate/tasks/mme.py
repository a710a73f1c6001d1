"""MME (Fu et al. 2023): perception and cognition, each alone, and the counting questions alone."""

import dataclasses
from collections.abc import Collection, Sequence

from experiments.evaluate.metrics.yes_no import COGNITION, PERCEPTION, mme_answer, mme_scores
from experiments.evaluate.tasks.prompts import SHORT
from experiments.evaluate.tasks.task import Known, Record, Sample, Scored, Task


def _sample(record: Record) -> Sample:
  answer = record.get("answer")
  return Sample(
    str(record["question_id"]),  # of the picture; `loading` tells its two questions apart
    (record["image"],),
    record["question"].strip().replace(" Please answer yes or no.", "") + SHORT,
    (answer.lower().strip().replace(".", ""),) if answer else (),
    category=record["category"],
    group=str(record["question_id"]),
  )


def _aggregate(scored: Sequence[Scored]) -> dict[str, float]:
  """Points: the sum over categories, of perception, of cognition, and each category's."""
  own = mme_scores((sample.category, sample.group, score) for sample, _, score in scored)
  perception, cognition = (sum(own.get(name, 0.0) for name in part) for part in (PERCEPTION, COGNITION))
  return {"points": sum(own.values()), "points: perception": perception, "points: cognition": cognition} | {
    f"points: {category}": value for category, value in own.items()
  }


MME = Task(
  name="mme",
  title="MME",
  repository="lmms-lab/MME",
  config=None,
  split="test",
  columns=("question_id", "image", "question", "category"),
  sample=_sample,
  score=lambda answer, sample: float(mme_answer(answer) == sample.references[0]),
  max_new_tokens=16,
  metric="points",
  aggregate=_aggregate,
  known={"LLaVA-1.5-7B": Known(1859.0, "FastV's README, by lmms-eval: 1510.8 + 348.2")},
)


def _part(name: str, title: str, categories: Collection[str], known: dict[str, Known]) -> Task:
  return dataclasses.replace(
    MME, name=name, title=title, keeps=lambda record: record["category"] in categories, known=known
  )


MME_PERCEPTION = _part(
  "mme_perception", "MME perception", PERCEPTION, {"LLaVA-1.5-7B": Known(1510.7, "LLaVA's model zoo")}
)
MME_COGNITION = _part(
  "mme_cognition", "MME cognition", COGNITION, {"LLaVA-1.5-7B": Known(348.2, "FastV's README, by lmms-eval")}
)
MME_COUNT = _part("mme_count", "MME count", ("count",), {})
