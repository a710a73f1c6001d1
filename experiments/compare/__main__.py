"""Compares pruning methods at equal numbers of image tokens.

    python -m experiments.compare --flagfile=experiments/flags/compare_demo.flags

Answers a set of questions with every cell of a grid, methods × budgets and explicit settings, and measures accuracy, costs
and time against no pruning. Interrupt it at any time: the same command goes on where it stopped.
"""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before transformers is imported anywhere

import pathlib
from collections.abc import Sequence

from absl import app, flags

from experiments import question_sets
from experiments.compare import study
from himap_jax import command, methods
from himap_jax.processing import DEFAULT_BUCKETS

_CHECKPOINT = flags.DEFINE_string("checkpoint", "demo", "As in himap_jax.run.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", sorted(command.DTYPES), "Of parameters and activations.")
_QUESTION_SET = flags.DEFINE_string(
  "question_set",
  "easyvqa",
  f"{', '.join(question_sets.SETS)}, or a JSONL file of id, image (relative to the file), question, answer, type and "
  "optionally guess, which is what can be answered without the picture.",
)
_NUM_QUESTIONS = flags.DEFINE_integer(
  "num_questions", None, "Questions drawn, each type in proportion; all when absent."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the draw of questions, of random methods and of the bootstrap.")
_METHODS = flags.DEFINE_list(
  "methods",
  ["random", "uniform", "himap"],
  f"Methods to run at every budget, each as METHOD or METHOD@LAYERS with layers joined by /, e.g. himap,himap@1/4. "
  f"Methods: {', '.join(methods.METHODS)}; or one before the decoder + one inside, as divprune+himap. No pruning is always "
  "run.",
)
_BUDGETS = flags.DEFINE_list(
  "budgets",
  ["192", "128", "64"],
  "Image tokens that enter a layer, averaged over layers; for shortv, those that a layer updates.",
)
_SETTINGS = flags.DEFINE_list(
  "settings",
  [],
  "Settings to run as they are, each as METHOD, METHOD@LAYERS or METHOD@LAYERS:KEEP, e.g. himap@2/8:288/72 or "
  "fastv:25%; what is left out is the method's own.",
)
_SHORTV_RANKING = flags.DEFINE_list(
  "shortv_ranking",
  None,
  "Layers from least to most useful, which shortv needs for a budget; see experiments.rank_layers.",
)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 8, "The longest answer, in tokens.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Questions per batch.")
_PROMPT_BUCKETS = flags.DEFINE_list("prompt_buckets", [str(b) for b in DEFAULT_BUCKETS], "As in himap_jax.run.")
_PROMPT_TEMPLATE = flags.DEFINE_string("prompt_template", "chat", "As in himap_jax.run.")
_TIMING_BATCH_SIZE = flags.DEFINE_integer("timing_batch_size", 1, "Questions in the batch that is timed.")
_TIMING_NEW_TOKENS = flags.DEFINE_integer("timing_new_tokens", 16, "Tokens decoded for each when timing.")
_TIMING_REPEATS = flags.DEFINE_integer(
  "timing_repeats", 5, "Turns of no pruning and a cell, of whose ratios the median counts; 0 measures no times."
)
_NUM_EXAMPLES = flags.DEFINE_integer("num_examples", 12, "Questions to browse in the report.")
_NUM_STRIPS = flags.DEFINE_integer("num_strips", 4, "How many of them strips.png shows.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Answers and times; a second start goes on from them.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Directory for tables, plots and the report.", required=True)
_COMPILATION_CACHE_DIR = flags.DEFINE_string("compilation_cache_dir", None, "As in himap_jax.run.")


def config_from_flags() -> study.StudyConfig:
  """Reads and checks the flags.

  Raises:
    ValueError: a flag that is malformed.
  """
  at_least_one = (_MAX_NEW_TOKENS, _BATCH_SIZE, _TIMING_BATCH_SIZE, _TIMING_NEW_TOKENS)
  at_least_one += () if _NUM_QUESTIONS.value is None else (_NUM_QUESTIONS,)
  for flag in at_least_one:
    if flag.value < 1:
      raise ValueError(f"--{flag.name} must be at least 1, but is {flag.value}")
  return study.StudyConfig(
    checkpoint=_CHECKPOINT.value,
    dtype=_DTYPE.value,
    question_set=_QUESTION_SET.value,
    num_questions=_NUM_QUESTIONS.value,
    seed=_SEED.value,
    methods=tuple(_METHODS.value),
    budgets=command.numbers(_BUDGETS, float),
    settings=tuple(_SETTINGS.value),
    shortv_ranking=command.numbers(_SHORTV_RANKING, int),
    max_new_tokens=_MAX_NEW_TOKENS.value,
    batch_size=_BATCH_SIZE.value,
    prompt_buckets=command.numbers(_PROMPT_BUCKETS, int),
    prompt_template=_PROMPT_TEMPLATE.value,
    timing_batch_size=_TIMING_BATCH_SIZE.value,
    timing_new_tokens=_TIMING_NEW_TOKENS.value,
    timing_repeats=_TIMING_REPEATS.value,
    num_examples=_NUM_EXAMPLES.value,
    num_strips=_NUM_STRIPS.value,
    workdir=pathlib.Path(_WORKDIR.value),
    output=pathlib.Path(_OUTPUT.value),
    compilation_cache_dir=command.compilation_cache_dir(_COMPILATION_CACHE_DIR.value),
  )


def run() -> int:
  """Runs the study that the flags describe."""
  study.run(config_from_flags())
  return 0


def main(argv: Sequence[str]) -> None:
  """Runs the command and exits with its status."""
  command.execute("experiments.compare", argv, run)


if __name__ == "__main__":
  app.run(main)
