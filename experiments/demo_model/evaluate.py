"""Accuracy of the demo model without pruning, by question type.

    python -m experiments.demo_model.evaluate --question_set=easyvqa --workdir=…

The questions about an image are packed behind it, as in training, with the positions and attention of single questions:
the same answers at a tenth of the cost. Repeating a command resumes it. For pruning see `experiments.compare`.
"""

import collections
import json
import pathlib

import jax
import numpy as np
from absl import app, flags

from experiments import question_sets
from experiments.demo_model.adapter import answer_logits
from experiments.demo_model.data import Sample
from experiments.demo_model.packing import Packer
from experiments.question_sets import Question, is_right
from experiments.shared import study, tabular
from experiments.shared.statistics import accuracy_by_type
from himap_jax import checkpoint
from himap_jax.checkpoint import LoadedModel
from himap_jax.run import command
from himap_jax.run.pictures import load_image
from himap_jax.run.progress import Progress

_CHECKPOINT = flags.DEFINE_string("checkpoint", "demo", "As in himap_jax.run.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", sorted(command.DTYPES), "Dtype of parameters and activations.")
_QUESTION_SET = flags.DEFINE_string("question_set", "easyvqa", "easyvqa, scenes, or a JSONL file of questions.")
_NUM_QUESTIONS = flags.DEFINE_integer("num_questions", None, "Questions drawn from the set (seed 0); all if absent.")
flags.DEFINE_string("workdir", None, "Directory of results, to resume from.", required=True)

QUESTION_SLOTS = 256


def right_answers(loaded: LoadedModel, questions: list[Question], results: pathlib.Path) -> dict[str, bool]:
  """Whether the greedy answer to each question is right; resumes from the file of results."""
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


def run() -> int:
  workdir = study.directory("workdir").absolute()
  questions = question_sets.load(_QUESTION_SET.value, num_questions=_NUM_QUESTIONS.value, seed=0, workdir=workdir)
  opened = checkpoint.open_checkpoint(_CHECKPOINT.value)
  settings = {"checkpoint": opened.digest(), "dtype": _DTYPE.value, "questions": question_sets.digest(questions)}
  command.check_settings(workdir / "settings.json", settings, "use another --workdir")
  loaded = opened.restore(dtype=command.DTYPES[_DTYPE.value])
  rows = {
    "question only": {question.id: is_right(question.guess, question.answer) for question in questions},
    "answers": right_answers(loaded, questions, workdir / "right.jsonl"),
  }
  right = np.array([[own[question.id] for question in questions] for own in rows.values()])
  types = accuracy_by_type(right, [question.type for question in questions])
  shares = np.column_stack([right.mean(axis=1), *types.values()])
  cells = [
    [name, str(len(questions)), *(f"{share:.2%}" for share in own)] for name, own in zip(rows, shares, strict=True)
  ]
  print("\n".join(tabular.markdown(["", "questions", "accuracy", *types], cells)))
  return 0


if __name__ == "__main__":
  app.run(lambda argv: command.execute("experiments.demo_model.evaluate", argv, run))
