"""ScienceQA (Lu et al. 2022): the test questions that have a picture."""

import pathlib
from collections.abc import Iterator

from experiments.evaluate.metrics.choice import LETTERS, lettered, scienceqa_letter
from experiments.evaluate.tasks.official import picture, read_json
from experiments.evaluate.tasks.prompts import choice_question
from experiments.evaluate.tasks.task import Known, Official, Record, Sample, Task


def _sample(record: Record) -> Sample:
  options, answer = lettered(record["choices"]), record.get("answer")
  context = f"Context: {record['hint']}\n" if record.get("hint") else ""
  return Sample(
    str(record.get("id", "")),
    (record["image"],),
    context + choice_question(record["question"], options),
    () if answer is None else (LETTERS[answer],),
    options,
    category=record.get("subject") or "",
  )


def _read(directory: pathlib.Path, split: str) -> Iterator[Record]:
  problems = read_json(directory / "problems.json")
  for number in read_json(directory / "pid_splits.json")[split]:
    problem = problems[number]
    if problem["image"]:
      image = picture(directory, f"{number}/{problem['image']}", f"images/{split}", split, "images")
      yield problem | {"id": number, "image": image}


SCIENCEQA = Task(
  name="scienceqa_img",
  title="ScienceQA-IMG test",
  repository="lmms-lab/ScienceQA",
  config="ScienceQA-IMG",
  split="test",
  columns=("image", "question", "choices", "hint"),
  sample=_sample,
  score=lambda answer, sample: float(scienceqa_letter(answer.strip(), sample.options) == sample.references[0]),
  max_new_tokens=16,
  known={"LLaVA-1.5-7B": Known(66.8, "LLaVA's model zoo")},
  keeps=lambda record: record["image"] is not None,
  official=Official(("problems.json", "pid_splits.json"), _read),
)
