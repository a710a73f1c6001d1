"""The flags that name what an analysis looks at, the same for every analysis."""

import dataclasses
import pathlib

from absl import flags

from experiments import question_sets
from experiments.flow import subject
from experiments.flow.subject import Subject
from himap_jax import command

_CHECKPOINT = flags.DEFINE_string("checkpoint", "demo", "As in himap_jax.run.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", sorted(command.DTYPES), "Of parameters and activations.")
_QUESTION_SET = flags.DEFINE_string(
  "question_set", "scenes", f"{', '.join(question_sets.SETS)}, or a JSONL file, as in experiments.compare."
)
_NUM_QUESTIONS = flags.DEFINE_integer("num_questions", 50, "Drawn from it, each type in proportion.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the draw, and of all chance after it.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 1, "Questions per batch.", lower_bound=1)
_PROMPT_BUCKETS = flags.DEFINE_list("prompt_buckets", ["64", "128", "256"], "As in himap_jax.run.")
_PROMPT_TEMPLATE = flags.DEFINE_string("prompt_template", "chat", "As in himap_jax.run.")
_WORKDIR = flags.DEFINE_string("workdir", None, "What was measured; a second start goes on from it.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Directory for what comes of it: tables, plots, files.", required=True)
_COMPILATION_CACHE_DIR = flags.DEFINE_string("compilation_cache_dir", None, "As in himap_jax.run.")


def directories() -> tuple[pathlib.Path, pathlib.Path]:
  """The work directory and that of the results, made where they are missing."""
  made = pathlib.Path(_WORKDIR.value), pathlib.Path(_OUTPUT.value)
  for directory in made:
    directory.mkdir(parents=True, exist_ok=True)
  return made


def read(workdir: pathlib.Path, *, needs_answers: bool = False) -> Subject:
  """What the flags name.

  Args:
    workdir: where a question set that has to be made is written.
    needs_answers: whether the questions' true answers are used.

  Raises:
    ValueError: there is no such checkpoint or question set, or a flag is malformed.
  """
  command.use_compilation_cache(command.compilation_cache_dir(_COMPILATION_CACHE_DIR.value))
  questions = question_sets.load(
    _QUESTION_SET.value,
    num_questions=_NUM_QUESTIONS.value,
    seed=_SEED.value,
    workdir=workdir,
    needs_answers=needs_answers,
  )
  made = subject.make(
    _CHECKPOINT.value,
    questions,
    dtype=command.DTYPES[_DTYPE.value],
    template=_PROMPT_TEMPLATE.value,
    buckets=command.numbers(_PROMPT_BUCKETS, int),
    batch_size=_BATCH_SIZE.value,
    seed=_SEED.value,
  )
  asked = {flag.name: flag.value for flag in (_QUESTION_SET, _NUM_QUESTIONS)}
  return dataclasses.replace(made, settings=made.settings | asked | {"questions": question_sets.digest(questions)})
