"""Compares pruning methods at equal numbers of image tokens.

    python -m experiments.compare --flagfile=experiments/flags/compare_demo.flags

Answers a set of questions with every cell of a grid, methods × budgets and explicit settings, and measures accuracy, costs
and time against no pruning. Interrupt it at any time: the same command goes on where it stopped.
"""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before transformers is imported anywhere

import pathlib

from absl import app, flags

from experiments import question_sets
from experiments.compare import study
from experiments.compare.grid import Grid
from experiments.compare.study import StudyConfig
from experiments.compare.timing import Timing
from himap_jax.engine.batching import DEFAULT_BUCKETS
from himap_jax.engine.engine import GenerationConfig
from himap_jax.generation import InputConfig
from himap_jax.pruning import methods
from himap_jax.run import command

_CHECKPOINT = flags.DEFINE_string("checkpoint", "demo", "As in himap_jax.run.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", sorted(command.DTYPES), "Of parameters and activations.")
_QUESTION_SET = flags.DEFINE_string(
  "question_set",
  "easyvqa",
  f"{', '.join(question_sets.SETS)}, or a JSONL file of id, image (relative to the file), question, answer, type and "
  "optionally guess, the answer that the question alone suggests.",
)
_NUM_QUESTIONS = flags.DEFINE_integer(
  "num_questions", None, "Questions drawn, each type in proportion; all if absent.", 1
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the draw of questions, of random methods and of the bootstrap.")
_METHODS = flags.DEFINE_list(
  "methods",
  ["random", "uniform", "himap"],
  f"Methods to run at every budget, each as METHOD or METHOD@LAYERS with layers joined by /, such as himap,himap@1/4. "
  f"Methods: {', '.join(methods.METHODS)}; or one before the decoder + one inside, as divprune+himap.",
)
_BUDGETS = flags.DEFINE_list(
  "budgets",
  ["192", "128", "64"],
  "Image tokens that enter a layer, averaged over layers; for shortv, those that a layer updates.",
)
_SETTINGS = flags.DEFINE_list(
  "settings",
  [],
  "Further cells, each as METHOD, METHOD@LAYERS or METHOD@LAYERS:KEEP, such as himap@2/8:288/72 or fastv:25%; what is left "
  "out is the method's own.",
)
_SHORTV_RANKING = flags.DEFINE_list(
  "shortv_ranking", None, "Layers from least to most useful, for shortv's budgets; see experiments.flow.rank_layers."
)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 8, "The longest answer, in tokens.", 1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Questions per batch.", 1)
_PROMPT_BUCKETS = flags.DEFINE_list("prompt_buckets", list(map(str, DEFAULT_BUCKETS)), "As in himap_jax.run.")
_PROMPT_TEMPLATE = flags.DEFINE_string("prompt_template", "chat", "As in himap_jax.run.")
_TIMING_BATCH_SIZE = flags.DEFINE_integer("timing_batch_size", 1, "Questions in the batch that is timed.", 1)
_TIMING_NEW_TOKENS = flags.DEFINE_integer("timing_new_tokens", 16, "Tokens decoded for each when timing.", 1)
_TIMING_REPEATS = flags.DEFINE_integer(
  "timing_repeats",
  5,
  "Runs of no pruning and a cell in turns, of whose ratios the median counts; 0 measures no times.",
  0,
)
_NUM_EXAMPLES = flags.DEFINE_integer("num_examples", 12, "Questions to browse in the report.")
_NUM_STRIPS = flags.DEFINE_integer("num_strips", 4, "How many of them strips.png shows.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of answers and times, to resume from.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Directory for tables, plots and the report.", required=True)
_COMPILATION_CACHE_DIR = flags.DEFINE_string("compilation_cache_dir", None, "As in himap_jax.run.")


def config_from_flags() -> StudyConfig:
  """Reads the flags; raises `UserError` where one is malformed."""
  budgets, ranking = command.numbers(_BUDGETS, float), command.numbers(_SHORTV_RANKING, int)
  return StudyConfig(
    checkpoint=_CHECKPOINT.value,
    question_set=_QUESTION_SET.value,
    workdir=pathlib.Path(_WORKDIR.value),
    output=pathlib.Path(_OUTPUT.value),
    grid=Grid(tuple(_METHODS.value), budgets, tuple(_SETTINGS.value), ranking),
    num_questions=_NUM_QUESTIONS.value,
    dtype=_DTYPE.value,
    generation=GenerationConfig(_MAX_NEW_TOKENS.value, seed=_SEED.value),
    inputs=InputConfig(_PROMPT_TEMPLATE.value, command.numbers(_PROMPT_BUCKETS, int), _BATCH_SIZE.value),
    timing=Timing(_TIMING_BATCH_SIZE.value, _TIMING_NEW_TOKENS.value, _TIMING_REPEATS.value),
    num_examples=_NUM_EXAMPLES.value,
    num_strips=_NUM_STRIPS.value,
    compilation_cache_dir=command.compilation_cache_dir(_COMPILATION_CACHE_DIR.value),
  )


def run() -> int:
  """Runs the comparison that the flags describe."""
  study.run(config_from_flags())
  return 0


if __name__ == "__main__":
  app.run(lambda argv: command.execute("experiments.compare", argv, run))
