"""SEED-Bench (Li et al. 2023): the questions about images."""

from experiments.evaluate.metrics.choice import leading_letter
from experiments.evaluate.tasks.prompts import choice_question
from experiments.evaluate.tasks.task import Known, Record, Sample, Task


def _sample(record: Record) -> Sample:
  options = {letter: record[f"choice_{letter.lower()}"] for letter in "ABCD"}
  answer, images = record.get("answer"), record["image"]
  return Sample(
    str(record["question_id"]),
    tuple(images) if isinstance(images, list) else (images,),
    choice_question(record["question"], options),
    (answer,) if answer else (),
    options,
    category=str(record.get("question_type_id", "")),
  )


SEED = Task(
  name="seed_image",
  title="SEED-Bench image",
  repository="lmms-lab/SEED-Bench",
  config=None,
  split="test",
  columns=("question_id", "question", "choice_a", "choice_b", "choice_c", "choice_d", "data_type", "image"),
  sample=_sample,
  score=lambda answer, sample: float(leading_letter(answer, sample.options) == sample.references[0]),
  max_new_tokens=16,
  known={"LLaVA-1.5-7B": Known(66.1, "LLaVA-1.5's paper, from memory; its model zoo has 58.6 with videos")},
  keeps=lambda record: record["data_type"] == "image",
)
