"""GQA (Hudson and Manning 2019): the balanced test-dev questions."""

from experiments.evaluate.metrics.text import gqa_match
from experiments.evaluate.tasks.prompts import SHORT
from experiments.evaluate.tasks.task import Known, Record, Sample, Task


def _sample(record: Record) -> Sample:
  answer = record.get("answer")
  return Sample(str(record["id"]), (record["image"],), record["question"] + SHORT, (answer,) if answer else ())


GQA = Task(
  name="gqa",
  title="GQA test-dev balanced",
  repository="lmms-lab/GQA",
  config="testdev_balanced_instructions",
  pictures="testdev_balanced_images",
  split="testdev",
  columns=("id", "imageId", "question"),
  sample=_sample,
  score=lambda answer, sample: gqa_match(answer, sample.references[0]),
  max_new_tokens=16,
  known={"LLaVA-1.5-7B": Known(62.0, "LLaVA's model zoo")},
)
