"""Compares pruning methods at equal numbers of image tokens.

    python -m experiments.compare --flagfile=experiments/flags/compare_scenes.flags

Answers a question set with every cell of a grid (methods × budgets, and explicit settings) and measures accuracy, costs
and time relative to no pruning. Repeating an interrupted command resumes it. A question without an answer counts as
wrong, and the status is 1 then.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from absl import flags

from experiments import question_sets
from experiments.compare import files, measure, report
from experiments.compare.comparison import Comparison, Pair, match_pair, parse_pair
from experiments.compare.grid import Shape, check, check_any, make_cells
from experiments.compare.power import power
from experiments.compare.prompt_sizes import prompt_sizes
from experiments.shared import study
from himap_jax import checkpoint
from himap_jax.engine.accounting import method_inputs
from himap_jax.engine.batching import DEFAULT_BUCKETS
from himap_jax.engine.engine import GenerationConfig
from himap_jax.pruning import methods
from himap_jax.run import flag_values

DEFAULTS = {"question_set": "easyvqa", "num_questions": None, "batch_size": 8}
DEFAULTS["prompt_buckets"] = list(map(str, DEFAULT_BUCKETS))


def define_flags() -> None:
  form = "each as METHOD or METHOD@LAYERS with layers joined by /, such as himap,himap@1/4"
  known = f"Methods: {', '.join(methods.METHODS)}; or one before the decoder + one inside, as divprune+himap; with "
  known += "RESTORE, as himap+restore or divprune+himap+restore; with positions kept, as divprune+positions."
  flags.DEFINE_list("methods", ["random", "uniform", "himap"], f"Methods to run at every budget, {form}. {known}")
  budget = "Image tokens that enter a layer, averaged over layers; for shortv, those that a layer updates."
  flags.DEFINE_list("budgets", ["192", "128", "64"], budget)
  form = "METHOD, METHOD@LAYERS or METHOD@LAYERS:KEEP, such as himap@2/8:288/72 or fastv:25%"
  flags.DEFINE_list("settings", [], f"Further cells, each as {form}; omitted parts are the method's own.")
  two = "Cells to compare with each other, each as LABEL~LABEL or LABEL~LABEL in TYPE/TYPE: divprune 64~random 64."
  flags.DEFINE_list("pairs", [], two)
  ranking = "Layers from least to most useful, for shortv's budgets; see experiments.flow.rank_layers."
  flags.DEFINE_list("shortv_ranking", None, ranking)
  flags.DEFINE_integer("max_new_tokens", 8, "Maximum answer length, in tokens.", 1)
  flags.DEFINE_integer("timing_batch_size", 1, "Questions in the timed batch.", 1)
  flags.DEFINE_integer("timing_new_tokens", 16, "Tokens decoded for each question when timing.", 1)
  repeats = "Timing repetitions, alternating with no pruning; the median ratio is reported; 0 disables timing."
  flags.DEFINE_integer("timing_repeats", 5, repeats, 0)
  kept = "Host memory, in GiB, for cached tower outputs, which all cells share."
  flags.DEFINE_float("encoding_gib", 4.0, kept, 0.0)
  flags.DEFINE_integer("num_seeds", 3, "Seeds of every cell that uses chance.", 1)
  least = "Stop before any answer if the questions cannot show a difference of so many points, with correction."
  flags.DEFINE_float("least_difference", None, least)
  expected = "Share of questions that is expected to be answered right by only one of two methods."
  flags.DEFINE_float("disagreement", 0.2, expected, 0.0, 1.0)
  flags.DEFINE_integer("num_examples", 12, "Number of questions in the report.")
  flags.DEFINE_integer("num_strips", 4, "Number of these questions in strips.png.")


def compare(values: Any) -> tuple[Comparison, list[report.Example], list[Pair]]:
  """Runs the missing cells; returns the comparison, the report's examples, and the pairs to compare."""
  budgets, ranking = flag_values.numbers(values["budgets"], float), flag_values.numbers(values["shortv_ranking"], int)
  check(values.methods, budgets, values.settings)
  for text in values.pairs:
    match_pair(text)
  generation = GenerationConfig(values.max_new_tokens, seed=values.seed)
  timing = {name: values[f"timing_{name}"].value for name in ("batch_size", "new_tokens", "repeats")}
  num_rows = math.gcd(values.batch_size, timing["batch_size"])
  batches = {"max_new_tokens": max(values.max_new_tokens, timing["new_tokens"]), "num_rows": num_rows}
  subject = study.load_subject(needs_answers=True, needs_sequence=False, **batches)
  opened, questions = subject.opened, subject.questions
  shape = Shape(num_image_tokens=subject.processor.num_image_tokens, **method_inputs(opened.config))
  cells = make_cells(shape, values.methods, budgets, values.settings, ranking)
  check_any(cells)
  pairs = [parse_pair(text, cells, questions) for text in values.pairs]
  settings = {
    **{name: values[name].value for name in ("checkpoint", "dtype", "question_set", "num_questions")},
    **dataclasses.asdict(generation),
    **dataclasses.asdict(study.inputs()),
    "timing": timing,
    "weights": opened.digest(),
    "questions": question_sets.digest(questions),
  }
  workdir = study.open_workdir(**settings)
  print(power(len(questions), cells, values.disagreement, values.least_difference), flush=True)
  runner = measure.Runner(subject, workdir, settings, generation, int(values.encoding_gib * 2**30))
  examples = report.choose(questions, values.num_examples)
  measured = measure.run_cells(runner, cells, examples, values.num_seeds)
  sizes = prompt_sizes(subject, jnp.dtype(checkpoint.DTYPES[values.dtype]).itemsize)
  comparison = Comparison(questions, cells, measured.answers, measured.timings, sizes, measured.repeats)
  return comparison, report.collect(examples, measured.shown, cells, subject), pairs


def write(comparison: Comparison, examples: Sequence[report.Example], pairs: Sequence[Pair], values: Any) -> str:
  """Writes the files by the flags; returns the table to print."""
  title = f"Pruning methods on {values.question_set}, {len(comparison.questions)} questions"
  options = {"title": title, "seed": values.seed, "num_strips": values.num_strips}
  return files.write(study.directory("output"), comparison, examples, pairs, **options)


def run(values: Any) -> tuple[str, int]:
  """Compares and writes; the status is 1 if a question has no answer, as where its picture is missing."""
  comparison, *others = compare(values)
  return write(comparison, *others, values), int(comparison.has_errors)


if __name__ == "__main__":
  study.start("compare", define_flags, run, **DEFAULTS)
