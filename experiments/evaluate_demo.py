"""Accuracy of the demo model, by type of question.

    python -m experiments.evaluate_demo --question_set=scenes --methods=none,himap --num_questions=500 --workdir=…
    python -m experiments.evaluate_demo --question_set=easyvqa --packed --workdir=…

The first form answers questions with `himap_jax.run`, one prompt a question, and resumes. The second evaluates no pruning on
all questions with the questions of an image packed behind it, as in training: the same positions and the same attention as
one by one, hence the same answers, at a tenth of the cost. The other flags are those of `himap_jax.run`. A work directory belongs
to one checkpoint and question set.
"""

import collections
import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from checkpoints_convert.marker import read_marker
from experiments import question_sets
from experiments.demo_data import Lesson, Packer, open_picture
from experiments.demo_model import answer_logits
from experiments.question_sets import Question, is_right
from himap_jax import attention, checkpoint, command, run, sharding
from himap_jax.llava import Llava
from himap_jax.run_config import config_from_flags

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Prompts, outputs and results; a second start goes on from them.", required=True
)
_METHODS = flags.DEFINE_list("methods", ["none", "himap"], "Pruning methods to evaluate.")
_QUESTION_SET = flags.DEFINE_string("question_set", "easyvqa", "easyvqa, scenes, or a JSONL file of questions.")
_NUM_QUESTIONS = flags.DEFINE_integer("num_questions", None, "Questions drawn from the set (seed 0); all when absent.")
_PACKED = flags.DEFINE_bool("packed", False, "Evaluate no pruning, with questions packed by image.")

IMAGE_SIZE = 336
MAX_NEW_TOKENS = 4
PROMPT_BUCKETS = (64, 128)


def packed_right(questions: list[Question], workdir: pathlib.Path) -> dict[str, bool]:
  """For every question whether the greedy answer without pruning is right."""
  results = workdir / "packed.jsonl"
  right = {}
  if results.exists():
    right = {row["id"]: row["right"] for row in map(json.loads, results.read_text().splitlines())}
  dtype = jnp.dtype(flags.FLAGS.dtype)
  loaded = checkpoint.load(flags.FLAGS.checkpoint, dtype=dtype)
  model = Llava(loaded.config, dtype, attention.for_mesh(sharding.make_mesh()))
  packer = Packer(loaded.processor, loaded.config, image_size=IMAGE_SIZE, question_slots=256)

  @jax.jit
  def predict(params, batch):
    return answer_logits(model, params, {}, batch).argmax(-1)

  by_image = collections.defaultdict(list)
  for question in questions:
    if question.id not in right:
      by_image[question.image].append(question)
  with open(results, "a", encoding="utf-8") as file:
    for image, group in tqdm(by_image.items(), unit="image"):
      picture, rest = open_picture(image), group
      for part in packer.split([(question.question, question.answer) for question in group]):
        batch = packer.pack([Lesson(picture, part)])
        correct = np.asarray(predict(loaded.params, batch))[0] == np.asarray(batch.answers)[0]
        valid, number = np.asarray(batch.answer_valid)[0], np.asarray(batch.answer_question)[0]
        for index, question in enumerate(rest[: len(part)]):
          right[question.id] = bool(correct[valid & (number == index)].all())
          file.write(json.dumps({"id": question.id, "right": right[question.id]}) + "\n")
        rest = rest[len(part) :]
        file.flush()
  return {question.id: right[question.id] for question in questions}


def method_right(method: str, questions: list[Question], workdir: pathlib.Path) -> dict[str, bool]:
  """For every question whether the answer of `himap_jax.run` is right."""
  prompts, output = workdir / "prompts.jsonl", workdir / f"{method}.jsonl"
  rows = ({"id": q.id, "image": str(q.image.absolute()), "question": q.question} for q in questions)
  prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
  flags.FLAGS.prompts, flags.FLAGS.output = str(prompts), str(output)
  changes = {"method": method, "max_new_tokens": MAX_NEW_TOKENS, "prompt_buckets": PROMPT_BUCKETS}
  run.run(dataclasses.replace(config_from_flags(), **changes))
  answers = {row["id"]: row["answer"] for row in map(json.loads, output.read_text().splitlines())}
  return {question.id: is_right(answers[question.id], question.answer) for question in questions}


def main(_) -> None:
  logging.set_verbosity(logging.WARNING)
  workdir = pathlib.Path(_WORKDIR.value).absolute()
  workdir.mkdir(parents=True, exist_ok=True)
  questions = question_sets.load(_QUESTION_SET.value, num_questions=_NUM_QUESTIONS.value, seed=0, workdir=workdir)
  settings = {name: flags.FLAGS[name].value for name in ("checkpoint", "dtype", "question_set", "num_questions")}
  settings["fingerprint"] = read_marker(checkpoint.resolve(flags.FLAGS.checkpoint))["fingerprint"]
  command.hold_to_settings(workdir / "settings.json", settings, "use another --workdir")
  command.use_compilation_cache(command.compilation_cache_dir(flags.FLAGS.compilation_cache_dir))
  rows = {"question only": {question.id: is_right(question.guess, question.answer) for question in questions}}
  if _PACKED.value:
    rows["none, packed"] = packed_right(questions, workdir)
  else:
    rows |= {method: method_right(method, questions, workdir) for method in _METHODS.value}
  types = list(dict.fromkeys(question.type for question in questions))
  table = Table("", "questions", "accuracy", *types)
  for name, right in rows.items():
    by_type = [[right[question.id] for question in questions if question.type == type] for type in types]
    parts = [list(right.values()), *by_type]
    table.add_row(name, str(len(right)), *(f"{np.mean(part):.2%}" for part in parts))
  Console(width=max(120, 14 * len(types))).print(table)


if __name__ == "__main__":
  app.run(main)
