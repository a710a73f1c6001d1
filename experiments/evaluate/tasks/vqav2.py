"""VQAv2 (Goyal et al. 2017): validation, and test-dev as a submission."""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

from experiments.evaluate.metrics import vqa
from experiments.evaluate.tasks.official import picture, read_json
from experiments.evaluate.tasks.prompts import SHORT
from experiments.evaluate.tasks.task import Known, Official, Record, Sample, Scored, Task

_PICTURES = {"validation": "val2014", "testdev": "test2015", "test": "test2015"}
_QUESTIONS = {"validation": "val2014", "testdev": "test-dev2015", "test": "test2015"}


def _sample(record: Record) -> Sample:
  return Sample(
    str(record["question_id"]),
    (record["image"],),
    record["question"] + SHORT,
    tuple(given["answer"] for given in record.get("answers") or ()),
    category=record.get("answer_type") or "",
    number=int(record["question_id"]),
  )


def _read(directory: pathlib.Path, split: str) -> Iterator[Record]:
  asked, folder = _QUESTIONS[split], _PICTURES[split]
  questions = read_json(directory / f"v2_OpenEnded_mscoco_{asked}_questions.json")["questions"]
  answers = directory / f"v2_mscoco_{asked}_annotations.json"
  annotations = {own["question_id"]: own for own in read_json(answers)["annotations"]} if answers.is_file() else {}
  for question in questions:
    name = f"COCO_{folder}_{question['image_id']:012d}.jpg"
    yield question | annotations.get(question["question_id"], {}) | {"image": picture(directory, name, folder)}


def submission(scored: Sequence[Scored]) -> list[dict[str, int | str]]:
  """EvalAI's form, with answers cleaned as LLaVA submits them."""
  return [{"question_id": one.sample.number, "answer": vqa.clean(one.answer or "")} for one in scored]


VQAV2 = Task(
  name="vqav2",
  title="VQAv2 val",
  repository="lmms-lab/VQAv2",
  config=None,
  split="validation",
  columns=("question_id", "question", "image"),
  sample=_sample,
  score=lambda answer, sample: vqa.accuracy(answer, sample.references),
  max_new_tokens=16,
  known={"LLaVA-1.5-7B": Known(76.6, "lmms-eval's results, from memory")},
  official=Official(("v2_OpenEnded_mscoco_*_questions.json",), _read),
  submission=submission,
)
VQAV2_TESTDEV = dataclasses.replace(
  VQAV2,
  name="vqav2_testdev",
  title="VQAv2 test-dev",
  split="testdev",
  known={"LLaVA-1.5-7B": Known(78.5, "LLaVA's model zoo")},
)
