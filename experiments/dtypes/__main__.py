"""Answers the same questions in float32, in bfloat16 and with int8 weights, and compares answers and kept image tokens.

    python -m experiments.dtypes --checkpoint=demo --num_questions=1000 --methods=none,himap,fastv

Flags of the model, the prompt template and generation are those of himap_jax.run. Repeating an interrupted command
resumes it.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments import question_sets
from experiments.dtypes import compare
from experiments.question_sets import Question
from experiments.shared import study, tabular
from himap_jax.engine.accounting import method_inputs
from himap_jax.errors import UserError
from himap_jax.pruning import methods
from himap_jax.pruning.config import PruningConfig
from himap_jax.run import job, model_flags
from himap_jax.run.config import RunConfig

# Flags of a run whose values this command chooses, or that belong to one method.
CHOSEN = ("method", "prune_layers", "keep", "method_parameters", "restore", "keep_positions", "schedule")
CHOSEN += ("dtype", "int8_weights")
FORMS = {"float32": ("float32", False), "bfloat16": ("bfloat16", False), "int8": ("bfloat16", True)}


def define_flags() -> None:
  flags.adopt_module_key_flags(model_flags)  # for --help
  flags.DEFINE_string("question_set", "scenes", f"{', '.join(question_sets.SETS)}, or a JSONL file.")
  flags.DEFINE_integer("num_questions", 1000, "Questions drawn.", lower_bound=1)
  flags.DEFINE_list("methods", ["none", "himap", "fastv", "divprune"], "Pruning methods, each with its own defaults.")


def measure(
  config: RunConfig, names: Sequence[str], questions: Sequence[Question], workdir: pathlib.Path
) -> list[tabular.Row]:
  """Answers the prompts of a run, which are the questions, with every method in every form: one row of each.

  Raises:
    UserError: as a run.
  """
  table: list[tabular.Row] = []
  for method in names:
    answers = {}
    for form, (dtype, int8_weights) in FORMS.items():
      output = workdir / f"{method}_{form}.jsonl"
      changes = dict(output=output, pruning=PruningConfig(method), dtype=dtype, int8_weights=int8_weights)
      job.run(dataclasses.replace(config, emit=frozenset({"kept"}), **changes))
      answers[form] = compare.read(output)
    table += compare.rows(method, answers, questions)
  return table


def run(values: Any) -> study.Report:
  given, names = model_flags.values_from_flags(), values.methods
  ignored = [f"--{name}" for name in CHOSEN if values[name].present]
  if ignored:
    raise UserError(f"{', '.join(ignored)}: every form of weights is tried, with the methods of --methods as they are")
  for method in names:
    methods.parse(method)
  drawn = dict(num_questions=values.num_questions, seed=0, workdir=study.directory("workdir"))
  questions = question_sets.load(values.question_set, **drawn, needs_answers=False)
  workdir = study.open_workdir(questions=question_sets.digest(questions))
  rows = [{"id": own.id, "image": str(own.image.absolute()), "question": own.question} for own in questions]
  prompts = workdir / "prompts.jsonl"
  prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
  config = RunConfig(**given, prompts=prompts, output=workdir / "answers.jsonl")
  for method in names:  # all can be run, before any is
    PruningConfig(method).schedule(**method_inputs(config.open().config))
  table = measure(config, names, questions, workdir)
  return study.Report(f"{len(questions)} questions", compare.summary(table), {"dtypes": table})


if __name__ == "__main__":
  study.start("dtypes", define_flags, run, has_subject=False)
