"""ChartQA (Masry et al. 2022): test, questions by people and generated ones."""

from experiments.evaluate.metrics.text import relaxed_match
from experiments.evaluate.tasks.task import Known, Record, Sample, Task, mean


def _sample(record: Record) -> Sample:
  answer = record.get("answer")
  return Sample(
    "",
    (record["image"],),
    record["question"] + "\nAnswer the question with a single word.",
    () if answer is None else (answer,),
    category=record["type"].removesuffix("_test"),
  )


CHARTQA = Task(
  name="chartqa",
  title="ChartQA test",
  repository="lmms-lab/ChartQA",
  config=None,
  split="test",
  columns=("type", "question", "image"),
  sample=_sample,
  score=lambda answer, sample: relaxed_match(answer.strip(), sample.references[0]),
  max_new_tokens=16,
  metric="relaxed accuracy",
  aggregate=lambda scored: mean(scored, "relaxed accuracy"),
  known={"LLaVA-1.5-7B": Known(18.2, "lmms-eval's results, from memory")},
)
