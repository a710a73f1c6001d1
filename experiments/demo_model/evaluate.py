"""Accuracy of the demo model without pruning, by type of question.

    python -m experiments.demo_model.evaluate --question_set=easyvqa --dtype=bfloat16 --workdir=… --output=…

The questions of an image are packed behind it, as in training: the same positions and the same attention as one by one,
hence the same answers but for rounding, at a tenth of the cost. It resumes. With pruning, see `experiments.compare`.
"""

import collections
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from experiments.demo_model.adapter import answer_logits
from experiments.demo_model.data import Sample
from experiments.demo_model.packing import Packer
from experiments.question_sets import Question, is_right
from experiments.shared import study, tabular
from experiments.shared.statistics import accuracy_by_type
from himap_jax.checkpoint import LoadedModel
from himap_jax.run.pictures import load_image
from himap_jax.run.progress import Progress

QUESTION_SLOTS = 256


def right_answers(loaded: LoadedModel, questions: Sequence[Question], results: pathlib.Path) -> dict[str, bool]:
  """For every question whether the greedy answer is right; the file of results resumes."""
  lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
  right = {row["id"]: row["right"] for row in map(json.loads, lines)}
  packer = Packer(loaded, loaded.prompts().image_shape[0], QUESTION_SLOTS)
  predict = jax.jit(lambda model, batch: answer_logits(model, {}, batch).argmax(-1))
  by_image = collections.defaultdict(list)
  for question in questions:
    if question.id not in right:
      by_image[question.image].append(question)
  with open(results, "a", encoding="utf-8") as file, Progress(len(by_image), "image", "evaluating") as progress:
    for image, group in by_image.items():
      picture, waiting = load_image(image), iter(group)
      for part in packer.split([(question.question, question.answer) for question in group]):
        batch = packer.pack([Sample(picture, part)])
        correct = (predict(loaded.model, batch) == batch.answers) | ~batch.answer_valid
        for index, question in zip(range(len(part)), waiting, strict=False):
          right[question.id] = bool((correct | (batch.answer_question != index)).all())
          file.write(json.dumps({"id": question.id, "right": right[question.id]}) + "\n")
        file.flush()
      progress.update()
  return right


def run(values: Any) -> study.Report:
  del values
  subject = study.load_subject(needs_answers=True, needs_sequence=False)
  questions = subject.questions
  rows = {
    "question only": {question.id: is_right(question.guess, question.answer) for question in questions},
    "with the picture": right_answers(subject.loaded, questions, study.workdir_for(subject) / "right.jsonl"),
  }
  right = np.array([[own[question.id] for question in questions] for own in rows.values()])
  types = accuracy_by_type(right, [question.type for question in questions])
  table = [
    {"answers": name, "accuracy": own.mean()} | {type: float(shares[number]) for type, shares in types.items()}
    for number, (name, own) in enumerate(zip(rows, right, strict=True))
  ]
  columns = {"answers": "{answers}"} | {name: f"{{{name}:.2%}}" for name in ("accuracy", *types)}
  return study.Report(f"{len(questions)} questions", tabular.formatted(table, columns), {"evaluate": table})


if __name__ == "__main__":
  study.start("demo_model.evaluate", lambda: None, run)
