"""Compares pruning methods at equal numbers of image tokens.

    python -m experiments.compare --flagfile=experiments/flags/compare_demo.flags

Answers a question set with every cell of a grid (methods × budgets, and explicit settings) and measures accuracy, costs
and time relative to no pruning. Repeating an interrupted command resumes it.
"""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before transformers is imported anywhere

import pathlib

from absl import app, flags

from experiments import question_sets
from experiments.compare import study
from experiments.compare.grid import Grid
from experiments.compare.study import StudyConfig, Timing
from himap_jax.engine.batching import DEFAULT_BUCKETS
from himap_jax.engine.engine import GenerationConfig
from himap_jax.generation import InputConfig
from himap_jax.pruning import methods
from himap_jax.run import command

flags.DEFINE_string("checkpoint", "demo", "As in himap_jax.run.")
flags.DEFINE_enum("dtype", "float32", sorted(command.DTYPES), "Dtype of parameters and activations.")
flags.DEFINE_string(
  "question_set",
  "easyvqa",
  f"{', '.join(question_sets.SETS)}, or a JSONL file of id, image (relative to the file), question, answer, type and "
  "optionally guess, the answer that the question alone suggests.",
)
flags.DEFINE_integer("num_questions", None, "Number of questions drawn, each type in proportion; all if absent.", 1)
flags.DEFINE_integer("seed", 0, "Seed of the draw of questions, of random methods and of the bootstrap.")
flags.DEFINE_list(
  "methods",
  ["random", "uniform", "himap"],
  f"Methods to run at every budget, each as METHOD or METHOD@LAYERS with layers joined by /, such as himap,himap@1/4. "
  f"Methods: {', '.join(methods.METHODS)}; or one before the decoder + one inside, as divprune+himap.",
)
flags.DEFINE_list(
  "budgets",
  ["192", "128", "64"],
  "Image tokens that enter a layer, averaged over layers; for shortv, those that a layer updates.",
)
flags.DEFINE_list(
  "settings",
  [],
  "Further cells, each as METHOD, METHOD@LAYERS or METHOD@LAYERS:KEEP, such as himap@2/8:288/72 or fastv:25%; omitted "
  "parts are the method's own.",
)
flags.DEFINE_list(
  "shortv_ranking", None, "Layers from least to most useful, for shortv's budgets; see experiments.flow.rank_layers."
)
flags.DEFINE_integer("max_new_tokens", 8, "Maximum answer length, in tokens.", 1)
flags.DEFINE_integer("batch_size", 8, "Questions per batch.", 1)
flags.DEFINE_list("prompt_buckets", list(map(str, DEFAULT_BUCKETS)), "As in himap_jax.run.")
flags.DEFINE_string("prompt_template", "chat", "As in himap_jax.run.")
flags.DEFINE_integer("timing_batch_size", 1, "Questions in the timed batch.", 1)
flags.DEFINE_integer("timing_new_tokens", 16, "Tokens decoded for each question when timing.", 1)
flags.DEFINE_integer(
  "timing_repeats", 5, "Turns of no pruning and a cell; the median of their ratios counts; 0 disables timing.", 0
)
flags.DEFINE_integer("num_examples", 12, "Number of questions in the report.")
flags.DEFINE_integer("num_strips", 4, "Number of these questions in strips.png.")
flags.DEFINE_string("workdir", None, "Directory of answers and times, to resume from.", required=True)
flags.DEFINE_string("output", None, "Directory for tables, plots and the report.", required=True)
flags.DEFINE_string("compilation_cache_dir", None, "As in himap_jax.run.")


def run() -> int:
  given = flags.FLAGS
  budgets, ranking = command.numbers(given["budgets"], float), command.numbers(given["shortv_ranking"], int)
  buckets = command.numbers(given["prompt_buckets"], int)
  same = ("checkpoint", "question_set", "num_questions", "dtype", "num_examples", "num_strips")
  config = StudyConfig(
    **{name: given[name].value for name in same},
    workdir=pathlib.Path(given.workdir),
    output=pathlib.Path(given.output),
    grid=Grid(tuple(given.methods), budgets, tuple(given.settings), ranking),
    generation=GenerationConfig(given.max_new_tokens, seed=given.seed),
    inputs=InputConfig(given.prompt_template, buckets, given.batch_size),
    timing=Timing(given.timing_batch_size, given.timing_new_tokens, given.timing_repeats),
    compilation_cache_dir=command.compilation_cache_dir(given.compilation_cache_dir),
  )
  study.run(config)
  return 0


if __name__ == "__main__":
  app.run(lambda argv: command.execute("experiments.compare", argv, run))
