"""POPE (Li et al. 2023): whether an object is in the picture, in three categories."""

import pathlib
from collections.abc import Iterator, Sequence

from experiments.evaluate.metrics.yes_no import pope_answer, pope_scores
from experiments.evaluate.tasks.official import picture, read_lines
from experiments.evaluate.tasks.prompts import SHORT
from experiments.evaluate.tasks.task import Known, Official, Record, Sample, Scored, Task
from himap_jax.errors import UserError

CATEGORIES = ("adversarial", "popular", "random")


def _sample(record: Record) -> Sample:
  answer = record.get("answer")
  return Sample(
    f"{record['category']}/{record['question_id']}",
    (record["image"],),
    record["question"].strip() + SHORT,
    (answer.lower().strip(),) if answer else (),
    category=record["category"],
    group=str(record.get("image_source", "")),
  )


def _aggregate(scored: Sequence[Scored]) -> dict[str, float]:
  """The mean of the categories' scores, as LLaVA reports F1, then each category's F1."""
  categories: dict[str, list[Scored]] = {}
  for one in scored:
    categories.setdefault(one.sample.category, []).append(one)
  own = {
    category: pope_scores([_answer(one) for one in rows], [one.sample.references[0] for one in rows])
    for category, rows in categories.items()
  }
  names = next(iter(own.values()))
  means = {name: sum(values[name] for values in own.values()) / len(own) for name in names}
  return means | {f"F1: {category}": values["F1"] for category, values in own.items()}


def _answer(one: Scored) -> str:
  """The answer; one that is missing is the wrong one."""
  if one.answer is not None:
    return pope_answer(one.answer)
  return "no" if one.sample.references[0] == "yes" else "yes"


def _read(directory: pathlib.Path, split: str) -> Iterator[Record]:
  del split
  paths = {category: directory / f"coco_pope_{category}.json" for category in CATEGORIES}
  if missing := [path.name for path in paths.values() if not path.is_file()]:
    raise UserError(f"{directory} lacks {', '.join(missing)}; the scores of POPE are means of its three categories")
  for category, path in paths.items():
    for row in read_lines(path):
      image = picture(directory, row["image"], "val2014")
      name = row["image"].removesuffix(".jpg")
      yield {"question": row["text"], "answer": row["label"], "category": category, "image_source": name} | {
        "question_id": row["question_id"],
        "image": image,
      }


POPE = Task(
  name="pope",
  title="POPE",
  repository="lmms-lab/POPE",
  config=None,
  split="test",
  columns=("question_id", "question", "image", "category"),
  sample=_sample,
  score=lambda answer, sample: float(pope_answer(answer) == sample.references[0]),
  max_new_tokens=128,
  metric="F1",
  aggregate=_aggregate,
  known={"LLaVA-1.5-7B": Known(85.9, "LLaVA's model zoo")},
  official=Official(("coco_pope_*.json",), _read),
)
