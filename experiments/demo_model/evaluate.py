"""Accuracy of the demo model, by type of question.

    python -m experiments.demo_model.evaluate --question_set=scenes --methods=none,himap --num_questions=500 --workdir=…
    python -m experiments.demo_model.evaluate --question_set=easyvqa --packed --workdir=…

The first form answers questions with `himap_jax.run`, one prompt a question, and resumes. The second evaluates no pruning on
all questions with the questions of an image packed behind it, as in training: the same positions and the same attention as
one by one, hence the same answers, at a tenth of the cost. The other flags are those of `himap_jax.run`.
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
from himap_jax.run import command, job
from himap_jax.run.flags import config_from_flags
from himap_jax.run.pictures import load_image
from himap_jax.run.progress import Progress

flags.DEFINE_string("workdir", None, "Directory of prompts and results, to resume from.", required=True)
_METHODS = flags.DEFINE_list("methods", ["none", "himap"], "Pruning methods to evaluate.")
_QUESTION_SET = flags.DEFINE_string("question_set", "easyvqa", "easyvqa, scenes, or a JSONL file of questions.")
_NUM_QUESTIONS = flags.DEFINE_integer("num_questions", None, "Questions drawn from the set (seed 0); all when absent.")
_PACKED = flags.DEFINE_bool("packed", False, "Evaluate no pruning, with questions packed by image.")

QUESTION_SLOTS = 256
RUN_FLAGS = {"max_new_tokens": 4, "prompt_buckets": ["64", "128"]}


def packed_right(questions: list[Question], workdir: pathlib.Path) -> dict[str, bool]:
  """For every question whether the greedy answer without pruning is right."""
  results = workdir / "packed.jsonl"
  right = {row["id"]: row["right"] for row in _read(results)} if results.exists() else {}
  loaded = checkpoint.load(flags.FLAGS.checkpoint, dtype=command.DTYPES[flags.FLAGS.dtype])
  packer = Packer(loaded, loaded.prompts().image_shape[0], QUESTION_SLOTS)
  predict = jax.jit(lambda model, batch: answer_logits(model, {}, batch).argmax(-1))
  by_image = collections.defaultdict(list)
  for question in questions:
    if question.id not in right:
      by_image[question.image].append(question)
  with open(results, "a", encoding="utf-8") as file, Progress(len(by_image), "image", "packed") as progress:
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


def method_right(method: str, questions: list[Question], workdir: pathlib.Path) -> dict[str, bool]:
  """For every question whether the answer of `himap_jax.run` is right."""
  prompts, output = workdir / "prompts.jsonl", workdir / f"{method}.jsonl"
  rows = ({"id": q.id, "image": str(q.image.absolute()), "question": q.question} for q in questions)
  prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
  for name, value in {"prompts": str(prompts), "output": str(output), "method": method, **RUN_FLAGS}.items():
    flags.FLAGS[name].value = value
  job.run(config_from_flags())
  answers = {row["id"]: row["answer"] for row in _read(output)}
  return {question.id: is_right(answers[question.id], question.answer) for question in questions}


def _read(path: pathlib.Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run() -> int:
  """Evaluates and prints a table."""
  workdir = study.directory("workdir").absolute()
  questions = question_sets.load(_QUESTION_SET.value, num_questions=_NUM_QUESTIONS.value, seed=0, workdir=workdir)
  settings = {name: flags.FLAGS[name].value for name in ("checkpoint", "dtype", "question_set", "num_questions")}
  settings["weights"] = checkpoint.open_checkpoint(flags.FLAGS.checkpoint).digest()
  command.check_settings(workdir / "settings.json", settings, "use another --workdir")
  command.use_compilation_cache(command.compilation_cache_dir(flags.FLAGS.compilation_cache_dir))
  rows = {"question only": {question.id: is_right(question.guess, question.answer) for question in questions}}
  if _PACKED.value:
    rows["none, packed"] = packed_right(questions, workdir)
  else:
    rows |= {method: method_right(method, questions, workdir) for method in _METHODS.value}
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
