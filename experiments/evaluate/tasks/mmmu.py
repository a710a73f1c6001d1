"""MMMU (Yue et al. 2023): validation."""

import ast
import re

from experiments.evaluate.metrics.choice import lettered
from experiments.evaluate.metrics.mmmu import chosen_letter, open_match
from experiments.evaluate.tasks.prompts import LETTER, SHORT
from experiments.evaluate.tasks.task import Known, Record, Sample, Task


def _sample(record: Record) -> Sample:
  """The question names its pictures as `<image 1>`; they are those of the sample, in that order."""
  is_choice, answer = record["question_type"] == "multiple-choice", record.get("answer")
  options = lettered(ast.literal_eval(record["options"])) if is_choice else {}
  text = "\n".join([record["question"], *(f"{letter}. {option}" for letter, option in options.items())])
  named = sorted(set(re.findall(r"<image (\d+)>", text)))
  wanted = ast.literal_eval(answer) if isinstance(answer, str) and answer.startswith("[") else answer
  return Sample(
    str(record["id"]),
    tuple(record[f"image_{number}"] for number in named),
    f"{text}\n{LETTER if is_choice else SHORT}",
    () if wanted in (None, "", "?") else tuple(wanted) if isinstance(wanted, list) else (str(wanted),),
    options,
    category=re.sub(r"^[^_]*_(.*)_\d+$", r"\1", str(record["id"])),
  )


def _score(answer: str, sample: Sample) -> float:
  if sample.options:
    return float(chosen_letter(answer, sample.options, seed=sample.id) in sample.references)
  return open_match(answer, sample.references)


MMMU = Task(
  name="mmmu",
  title="MMMU val",
  repository="lmms-lab/MMMU",
  config=None,
  split="validation",
  columns=("id", "question", "options", "question_type", "image_1"),
  sample=_sample,
  score=_score,
  max_new_tokens=128,
  known={"LLaVA-1.5-7B": Known(35.3, "FastV's README, by lmms-eval")},
)
