"""Accuracy of the demo model on easy-VQA's test questions.

    python -m experiments.evaluate_demo --methods=none,himap --num_questions=500 --workdir=…
    python -m experiments.evaluate_demo --packed --workdir=…

The first form answers questions with `himap_jax.run`, one prompt a question, and resumes. The second evaluates no pruning on
all questions with the questions of an image packed behind it, as in training: the same positions and the same attention as
one by one, hence the same answers, at a tenth of the cost.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from checkpoints_convert.demo import easyvqa
from experiments.demo_data import Packer, question_only_answers, questions_by_image
from experiments.demo_model import answer_logits
from himap_jax import checkpoint, run
from himap_jax.llava import Llava
from himap_jax.sampling import Sampling

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Prompts, outputs and results; a second start goes on from them.", required=True
)
_METHODS = flags.DEFINE_list("methods", ["none", "himap"], "Pruning methods to evaluate.")
_NUM_QUESTIONS = flags.DEFINE_integer("num_questions", 500, "Questions drawn from the test split (seed 0).")
_PACKED = flags.DEFINE_bool("packed", False, "Evaluate no pruning on all questions, packed by image.")

IMAGE_SIZE = 336


def packed_right(workdir: pathlib.Path) -> dict[str, bool]:
  """For every test question whether the greedy answer without pruning is right."""
  results = workdir / "packed.jsonl"
  right = {}
  if results.exists():
    right = {row["id"]: row["right"] for row in map(json.loads, results.read_text().splitlines())}
  loaded = checkpoint.load(flags.FLAGS.checkpoint, dtype=jnp.float32)
  model = Llava(loaded.config, jnp.float32)
  packer = Packer(loaded.processor, loaded.config, image_size=IMAGE_SIZE, question_slots=256)

  @jax.jit
  def predict(params, batch):
    return answer_logits(model, params, {}, batch).argmax(-1)

  groups = [part for group in questions_by_image("test") for part in packer.split(group)]
  with open(results, "a", encoding="utf-8") as file:
    for group in tqdm(groups, unit="image"):
      if group[-1].id in right:
        continue
      batch = packer.pack([group])
      correct = np.asarray(predict(loaded.params, batch))[0] == np.asarray(batch.answers)[0]
      valid, question = np.asarray(batch.answer_valid)[0], np.asarray(batch.answer_question)[0]
      for index, example in enumerate(group):
        right[example.id] = bool(correct[valid & (question == index)].all())
        file.write(json.dumps({"id": example.id, "right": right[example.id]}) + "\n")
      file.flush()
  return right


def method_right(method: str, examples: list[easyvqa.Example], workdir: pathlib.Path) -> dict[str, bool]:
  """For every question whether the answer of `himap_jax.run` is right."""
  prompts, output = workdir / "prompts.jsonl", workdir / f"{method}.jsonl"
  easyvqa.write_prompts(prompts, examples)
  run.run(
    run.RunConfig(
      checkpoint=flags.FLAGS.checkpoint,
      prompts=prompts,
      image_dir=workdir,
      output=output,
      pictures=None,
      method=method,
      prune_layers=None,
      keep=None,
      max_new_tokens=4,
      sampling=Sampling(),
      seed=0,
      ignore_eos=False,
      batch_size=8,
      prompt_buckets=(64, 128),
      prompt_template="chat",
      dtype="float32",
      emit=frozenset(),
      resume=True,
      strict=False,
      compilation_cache_dir=str(checkpoint.default_cache_dir() / "compiled"),
    )
  )
  answers = {row["id"]: row["answer"] for row in map(json.loads, output.read_text().splitlines())}
  return {example.id: answers[example.id] == example.answer for example in examples}


def main(_) -> None:
  logging.set_verbosity(logging.WARNING)
  workdir = pathlib.Path(_WORKDIR.value).absolute()
  workdir.mkdir(parents=True, exist_ok=True)
  cache_dir = checkpoint.default_cache_dir()
  test = easyvqa.load(cache_dir, "test")
  guesses = question_only_answers(easyvqa.load(cache_dir, "train"))
  examples = test
  if not _PACKED.value:
    chosen = np.random.default_rng(0).permutation(len(test))[: _NUM_QUESTIONS.value]
    examples = [test[index] for index in sorted(chosen)]
  rows = {"question only": {example.id: guesses.get(example.question) == example.answer for example in examples}}
  if _PACKED.value:
    rows["none"] = packed_right(workdir)
  else:
    rows |= {method: method_right(method, examples, workdir) for method in _METHODS.value}
  yes_no = {example.id for example in examples if example.answer in ("yes", "no")}
  table = Table("", "questions", "accuracy", "yes or no", "colour or shape")
  for name, right in rows.items():
    kinds = [[right[i] for i in right if (i in yes_no) == wanted] for wanted in (True, False)]
    table.add_row(name, str(len(right)), *(f"{np.mean(part):.2%}" for part in (list(right.values()), *kinds)))
  Console().print(table)


if __name__ == "__main__":
  app.run(main)
