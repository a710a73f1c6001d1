"""Compares pruning methods at equal numbers of image tokens.

    python -m experiments.compare --flagfile=experiments/flags/compare_scenes.flags

Answers a question set with every cell of a grid (methods × budgets, and explicit settings) and measures accuracy, costs
and time relative to no pruning. Repeating an interrupted command resumes it.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from absl import flags

from experiments import question_sets
from experiments.compare import measure, plots, report, tables
from experiments.compare.comparison import BY_SIZE, BY_TYPE, Comparison, Pair, PromptSizes, controls, parse_pair
from experiments.compare.grid import REFERENCE, Cell, Shape, check, make_cells
from experiments.shared import study, tabular
from experiments.shared.statistics import POWER, smallest_difference
from himap_jax.engine.accounting import method_inputs, model_sizes
from himap_jax.engine.batching import DEFAULT_BUCKETS
from himap_jax.engine.engine import GenerationConfig
from himap_jax.errors import UserError
from himap_jax.pruning import methods
from himap_jax.run import command

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
  budgets, ranking = command.numbers(values["budgets"], float), command.numbers(values["shortv_ranking"], int)
  check(values.methods, budgets, values.settings)
  generation = GenerationConfig(values.max_new_tokens, seed=values.seed)
  timing = {name: values[f"timing_{name}"].value for name in ("batch_size", "new_tokens", "repeats")}
  num_rows = math.gcd(values.batch_size, timing["batch_size"])
  max_new_tokens = max(values.max_new_tokens, timing["new_tokens"])
  batches = {"max_new_tokens": max_new_tokens, "num_rows": num_rows}
  subject = study.load_subject(needs_answers=True, needs_sequence=False, **batches)
  opened, questions, num_image_tokens = subject.opened, subject.questions, subject.processor.num_image_tokens
  shape = Shape(num_image_tokens=num_image_tokens, **method_inputs(opened.config))
  cells = make_cells(shape, values.methods, budgets, values.settings, ranking)
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
  for name in ("answers", "shown", "timings"):
    (workdir / name).mkdir(exist_ok=True)
  print(power(len(questions), cells, values), flush=True)
  runner = measure.Runner(subject, workdir, settings, generation, int(values.encoding_gib * 2**30))
  answers, timings, repeats, shown = {}, {}, {}, {}
  examples = report.choose(questions, values.num_examples)
  for number, cell in enumerate(cells, start=1):
    print(f"[{number}/{len(cells)}] {cell.label}{f': {cell.note}' if cell.note else ''}", flush=True)
    if cell.schedule is not None:
      answers[cell.label] = runner.answer(cell)
      if cell.method == REFERENCE:
        measure.report_errors(answers[cell.label])
      shown[cell.label] = runner.show(cell, examples)
      timings[cell.label] = runner.time(cell)
      if cell.uses_chance:
        repeats[cell.label] = [runner.answer(cell, repeat=repeat) for repeat in range(1, values.num_seeds)]
  bytes_per_value, num_text_tokens = jnp.dtype(command.DTYPES[values.dtype]).itemsize, measure.mean_text_length(subject)
  sizes = model_sizes(opened.config, subject.processor.image_shape)
  num_tiles = subject.processor.image_size([(1, 1)]).num_tiles  # the same for pictures of all sizes
  sizes = PromptSizes(sizes, num_image_tokens, num_text_tokens, bytes_per_value, num_tiles)
  comparison = Comparison(questions, cells, answers, timings, sizes, repeats)
  return comparison, report.collect(examples, shown, cells, subject), pairs


def power(num_questions: int, cells: Sequence[Cell], values: Any) -> str:
  """Says what difference the questions can show, as if random tokens had one seed, which is cautious.

  Raises:
    UserError: the difference with correction is more than `--least_difference`.
  """
  comparisons = max(1, sum(label != control for label, control in controls(cells).items()))
  one, all_ = (smallest_difference(num_questions, values.disagreement, comparisons=n) for n in (1, comparisons))
  text = (
    f"{num_questions} questions, of which {values.disagreement:.0%} are answered right by only one of two methods, show "
    f"a difference of {100 * one:.1f} points with a power of {POWER:.0%} in a single test, and one of "
    f"{100 * all_:.1f} points corrected for {comparisons} comparisons"
  )
  if values.least_difference is not None and 100 * all_ > values.least_difference:
    raise UserError(f"{text}; the requested limit is {values.least_difference:g} points: take more questions")
  return text


def write(comparison: Comparison, examples: Sequence[report.Example], pairs: Sequence[Pair], values: Any) -> str:
  """Writes tables, plots and the report; returns the table to print."""
  rows, directory = comparison.rows(seed=values.seed), study.directory("output")
  columns, num_layers = tables.readable_columns(rows), comparison.sizes.model.num_layers
  title = f"Pruning methods on {values.question_set}, {len(comparison.questions)} questions"
  texts = {
    "table.md": tables.markdown(rows, columns),
    "findings.md": tables.findings(rows),
    "types.md": tables.by_group(rows, BY_TYPE),
    **({"sizes.md": tables.by_group(rows, BY_SIZE)} if tables.groups_of(rows, BY_SIZE) else {}),
    **({"pairs.md": tables.pairs(comparison.pairs(pairs, seed=values.seed))} if pairs else {}),
    "report.html": report.render(columns, tables.readable_rows(rows), examples, title=title, num_layers=num_layers),
  }
  for name, text in texts.items():
    (directory / name).write_text(text, encoding="utf-8")
  tabular.write_csv(directory / "table.csv", rows)
  plots.plot_costs(directory / "flops.png", rows, plots.FLOPS)
  if any(row.get("prefill_time") for row in rows):
    plots.plot_costs(directory / "time.png", rows, plots.TIME)
  plots.plot_types(directory / "types.png", rows)
  if tables.groups_of(rows, BY_SIZE):
    plots.plot_sizes(directory / "sizes.png", rows)
  plots.draw_strips(directory / "strips.png", examples[: values.num_strips], report.cells_to_show(comparison.cells))
  printed = [report.Column("label", "", "text"), *(column for column in columns if column.name in tables.PRINTED)]
  return tables.markdown([row for row in rows if not row.get("note")], printed)


if __name__ == "__main__":
  study.start("compare", define_flags, lambda values: write(*compare(values), values), **DEFAULTS)
