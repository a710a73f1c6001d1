"""Answers the same questions in float32, in bfloat16 and with int8 weights, and compares answers and kept image tokens.

    python -m experiments.dtypes --checkpoint=demo --questions=scenes --num_questions=1000 --methods=none,himap,fastv

Flags of the model, the prompt template and generation are those of himap_jax.run. Repeating an interrupted command
resumes it.
"""

import dataclasses
import json
import pathlib

from absl import flags

from experiments import question_sets
from experiments.dtypes import compare
from himap_jax.engine.accounting import method_inputs
from himap_jax.errors import UserError
from himap_jax.pruning import methods
from himap_jax.pruning.config import PruningConfig
from himap_jax.run import command, job, model_flags
from himap_jax.run.config import RunConfig

# Flags of a run whose values this command chooses, or that belong to one method.
CHOSEN = ("method", "prune_layers", "keep", "method_parameters", "restore", "keep_positions", "schedule")
CHOSEN += ("dtype", "int8_weights")
FORMS = {"float32": ("float32", False), "bfloat16": ("bfloat16", False), "int8": ("bfloat16", True)}


def define_flags() -> None:
  flags.adopt_module_key_flags(model_flags)  # for --help
  flags.DEFINE_string("questions", "scenes", f"{', '.join(question_sets.SETS)}, or a JSONL file.")
  flags.DEFINE_integer("num_questions", 1000, "Questions drawn.", lower_bound=1)
  flags.DEFINE_list("methods", ["none", "himap", "fastv", "divprune"], "Pruning methods, each with its own defaults.")
  flags.DEFINE_string("workdir", "dtypes_work", "Directory for questions and answers; resumed on restart.")


def measure(config: RunConfig, names: list[str], workdir: pathlib.Path) -> list[tuple[str, str, compare.Agreement]]:
  """Answers the prompts of a run in every form, and returns the agreement of each method and form with float32.

  Raises:
    UserError: as a run.
  """
  found = []
  for method in names:
    rows = {}
    for form, (dtype, int8_weights) in FORMS.items():
      output = workdir / f"{method}_{form}.jsonl"
      changes = dict(output=output, pruning=PruningConfig(method), dtype=dtype, int8_weights=int8_weights)
      job.run(dataclasses.replace(config, emit=frozenset({"kept"}), **changes))
      rows[form] = compare.read(output)
    found += [(method, form, compare.agreement(rows["float32"], rows[form])) for form in FORMS if form != "float32"]
  return found


def run() -> int:
  """Measures what the flags say and prints the table."""
  values, workdir, names = model_flags.values_from_flags(), pathlib.Path(flags.FLAGS.workdir), flags.FLAGS.methods
  ignored = [f"--{name}" for name in CHOSEN if flags.FLAGS[name].present]
  if ignored:
    raise UserError(f"{', '.join(ignored)}: every form of weights is tried, with the methods of --methods as they are")
  for method in names:
    methods.parse(method)
  given = dict(name=flags.FLAGS.questions, num_questions=flags.FLAGS.num_questions)
  questions = question_sets.load(**given, seed=0, workdir=workdir, needs_answers=False)
  workdir.mkdir(parents=True, exist_ok=True)
  command.check_settings(
    workdir / "settings.json", {"questions": question_sets.digest(questions)}, "use another --workdir"
  )
  rows = [{"id": own.id, "image": str(own.image.absolute()), "question": own.question} for own in questions]
  prompts = workdir / "prompts.jsonl"
  prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
  config = RunConfig(**values, prompts=prompts, output=workdir / "answers.jsonl")
  for method in names:  # all can be run, before any is
    PruningConfig(method).schedule(**method_inputs(config.open().config))
  print(compare.table(measure(config, names, workdir)))
  return 0


if __name__ == "__main__":
  define_flags()
  command.start_action("experiments.dtypes", run)
