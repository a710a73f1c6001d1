"""TextVQA (Singh et al. 2019): validation, without and with the text that an OCR system read."""

import dataclasses
import pathlib
from collections.abc import Iterator

from experiments.evaluate.metrics import vqa
from experiments.evaluate.tasks import vqav2
from experiments.evaluate.tasks.official import picture, read_json
from experiments.evaluate.tasks.prompts import SHORT
from experiments.evaluate.tasks.task import Known, Official, Record, Sample, Task

_SHORT_NAME = {"validation": "val"}


def _sample(record: Record, ocr: str = "") -> Sample:
  return Sample(
    str(record["question_id"]),
    (record["image"],),
    record["question"].capitalize() + ocr + SHORT,
    tuple(record.get("answers") or ()),
    number=int(record["question_id"]),
  )


def _sample_with_ocr(record: Record) -> Sample:
  return _sample(record, f"\nReference OCR token: {', '.join(record['ocr_tokens'])}")


def _read(directory: pathlib.Path, split: str) -> Iterator[Record]:
  split = _SHORT_NAME.get(split, split)
  folder = "test_images" if split == "test" else "train_images"
  ocr = directory / f"TextVQA_Rosetta_OCR_v0.2_{split}.json"
  words = {own["image_id"]: own["ocr_tokens"] for own in read_json(ocr)["data"]} if ocr.is_file() else {}
  for question in read_json(directory / f"TextVQA_0.5.1_{split}.json")["data"]:
    image = picture(directory, f"{question['image_id']}.jpg", folder)
    tokens = words.get(question["image_id"])
    yield question | {"image": image} | ({} if tokens is None else {"ocr_tokens": tokens})


TEXTVQA = Task(
  name="textvqa",
  title="TextVQA val",
  repository="lmms-lab/textvqa",
  config=None,
  split="validation",
  columns=("question_id", "question", "image"),
  sample=_sample,
  score=lambda answer, sample: vqa.textvqa_accuracy(answer, sample.references),
  max_new_tokens=128,
  known={"LLaVA-1.5-7B": Known(46.1, "lmms-eval's results, from memory")},
  official=Official(("TextVQA_0.5.1_*.json",), _read),
  submission=vqav2.submission,
)
TEXTVQA_OCR = dataclasses.replace(
  TEXTVQA,
  name="textvqa_ocr",
  title="TextVQA val, OCR tokens given",
  columns=("question_id", "question", "image", "ocr_tokens"),
  sample=_sample_with_ocr,
  known={"LLaVA-1.5-7B": Known(58.2, "LLaVA's model zoo")},
)
