"""MMBench (Liu et al. 2023): the English dev questions, without a judge."""

import base64
import csv
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from experiments.evaluate.metrics.choice import mmbench_letter
from experiments.evaluate.tasks.official import find
from experiments.evaluate.tasks.prompts import choice_question
from experiments.evaluate.tasks.task import Known, Official, Record, Sample, Scored, Task

# A question's copies with other orders of its options have this times 1, 2, 3 added to its index.
_CIRCULAR = 1_000_000
_LONGEST_INDEX = 64  # characters; a longer `image` is a picture, a shorter one the index of the row that holds it


def _sample(record: Record) -> Sample:
  options = {letter: record[letter] for letter in "ABCD" if not _is_none(record[letter])}
  hint = "" if _is_none(record["hint"]) else f"{record['hint']}\n"
  index, answer = int(record["index"]), record.get("answer")
  return Sample(
    str(index),
    (record["image"],),
    hint + choice_question(record["question"], options),
    () if _is_none(answer) else (answer,),
    options,
    category=record.get("L2-category") or record.get("l2-category") or "",
    group=str(index % _CIRCULAR),
    number=index,
  )


def _is_none(value: Any) -> bool:
  return value is None or value != value or str(value).lower() in ("nan", "none", "")


def _aggregate(scored: Sequence[Scored]) -> dict[str, float]:
  """Share of questions that are answered rightly in every order of their options that was asked; by L2 category."""
  right: dict[tuple[str, str], float] = {}
  for sample, _, score in scored:
    key = sample.category, sample.group
    right[key] = min(right.get(key, 1.0), score)
  values = {"accuracy": list(right.values())}
  for (category, _), score in right.items():
    values.setdefault(f"accuracy: {category}", []).append(score)
  return {name: 100 * sum(own) / len(own) for name, own in values.items()}


def _read(directory: pathlib.Path, split: str) -> Iterator[Record]:
  path = find(directory, "*.tsv", split)
  shared = {row["image"] for row in _rows(path) if len(row["image"]) <= _LONGEST_INDEX}
  held = {row["index"]: row["image"] for row in _rows(path) if row["index"] in shared} if shared else {}
  for row in _rows(path):
    yield row | {"image": base64.b64decode(held.get(row["image"], row["image"]))}


def _rows(path: pathlib.Path) -> Iterator[dict[str, str]]:
  csv.field_size_limit(sys.maxsize)
  with open(path, encoding="utf-8", newline="") as file:
    yield from csv.DictReader(file, delimiter="\t")


MMBENCH = Task(
  name="mmbench_en",
  title="MMBench en dev",
  repository="lmms-lab/MMBench",
  config="en",
  split="dev",
  columns=("index", "question", "hint", "A", "B", "C", "D", "image"),
  sample=_sample,
  score=lambda answer, sample: float(mmbench_letter(answer, sample.options) == sample.references[0]),
  max_new_tokens=128,
  aggregate=_aggregate,
  known={"LLaVA-1.5-7B": Known(64.3, "LLaVA's model zoo, scored by MMBench's server")},
  official=Official(("*.tsv",), _read),
)
