"""Evaluates a model with pruning on the field's benchmarks.

    python -m experiments.evaluate --tasks=textvqa,pope,mme --settings=none,himap,fastv --checkpoint=… --workdir=… \\
      --output=…

Every task is answered with every setting, by the prompts and scored by the metrics that its authors use; a task
`lmms:NAME` is lmms-eval's. Repeating the command resumes it; `--score_only` scores the answers that are there
without loading weights.
"""

from typing import Any

from absl import flags

from experiments.compare.grid import parse_setting
from experiments.evaluate import report
from experiments.evaluate.evaluator import EvaluationConfig, Evaluator
from experiments.evaluate.harness import PREFIX, HarnessTask
from experiments.evaluate.paper import TABLES, with_paper
from experiments.evaluate.scores import REFERENCE
from experiments.evaluate.tasks import TASKS, find_task
from experiments.evaluate.tasks.task import Task
from experiments.shared import study, tabular
from himap_jax import checkpoint
from himap_jax.engine.accounting import method_inputs, model_sizes
from himap_jax.harness.settings import Settings
from himap_jax.run import command

SETTINGS = ("checkpoint", "dtype", "batch_size", "max_new_tokens", "prompt_template", "image_aspect_ratio", "seed")


def define_flags() -> None:
  own = f"Any of {', '.join(TASKS)}, or {PREFIX}NAME for a task of lmms-eval with its own questions and metrics."
  flags.DEFINE_list("tasks", None, own, required=True)
  flags.DEFINE_string("include_path", None, "A directory with more tasks of lmms-eval, as its own flag.")
  flags.DEFINE_list(
    "settings",
    [REFERENCE, "himap"],
    "Methods with their own settings, or settings such as himap@2/8:288/72 and fastv@2:50%.",
  )
  flags.DEFINE_string("checkpoint", "demo", "As in himap_jax.run.")
  flags.DEFINE_bool("allow_pickle", False, "As in himap_jax.run.")
  flags.DEFINE_enum("paper_table", None, list(TABLES), "A table of HiMAP's paper, whose numbers are shown beside ours.")
  flags.DEFINE_string(
    "data", None, "A directory with a data set as the hub lays it out or its official files; the hub by default."
  )
  longest = "Longest answer to a task of lmms-eval that gives no number."
  flags.DEFINE_integer("max_new_tokens", 128, longest, lower_bound=1)
  flags.DEFINE_integer("limit", None, "Questions of every task; all by default.", lower_bound=1)
  flags.DEFINE_enum(
    "image_aspect_ratio",
    "checkpoint",
    checkpoint.ASPECT_RATIOS,
    "Whether pictures are padded to squares, as LLaVA-1.5's published scores need.",
  )
  flags.DEFINE_string("prompt_template", "chat", "As in himap_jax.run.")
  flags.DEFINE_enum("dtype", "bfloat16", sorted(checkpoint.DTYPES), "Dtype of parameters and activations.")
  flags.DEFINE_integer("batch_size", 8, "Rows per batch.", lower_bound=1)
  flags.DEFINE_integer("seed", 0, "Seed of methods that choose at random, and of the bootstrap.")
  flags.DEFINE_bool("score_only", False, "Score the answers in --workdir and answer no more questions.")
  flags.DEFINE_string("compilation_cache_dir", None, "As in himap_jax.run.")


def run(values: Any) -> study.Report:
  names = list(dict.fromkeys(values.tasks))
  tasks = [find_task(name) for name in names if not name.startswith(PREFIX)]
  harness_tasks = [
    HarnessTask(name.removeprefix(PREFIX), values.include_path) for name in names if name.startswith(PREFIX)
  ]
  for harness_task in harness_tasks:
    harness_task.check()
  settings = {label: parse_setting(label) for label in values.settings}
  opened = checkpoint.open_checkpoint(values.checkpoint, allow_pickle=values.allow_pickle).with_aspect_ratio(
    values.image_aspect_ratio
  )
  schedules = {label: pruning.schedule(**method_inputs(opened.config)) for label, pruning in settings.items()}
  sizes = model_sizes(opened.config, opened.prompts(values.prompt_template).blank.images.pixels.shape[2:])
  command.use_compilation_cache(command.compilation_cache_dir(values.compilation_cache_dir))
  common = {name: values[name].value for name in SETTINGS}
  directories = study.directory("workdir"), study.directory("output")
  config = EvaluationConfig(Settings(**common), *directories, values.data, values.limit, values.score_only)
  evaluator = Evaluator(opened, config, schedules, sizes)
  for task in tasks if not values.score_only else ():
    evaluator.check(task)
  rows: list[tabular.Row] = []
  for task in (*tasks, *harness_tasks):
    rows += evaluator.rows(task) if isinstance(task, Task) else evaluator.harness_rows(task)
    shown = with_paper(rows, values.paper_table) if values.paper_table else rows
    made = study.Report(
      f"{values.limit or 'all'} questions of a task", report.summary(shown, tasks), {"evaluate": shown}
    )
    study.write(made, "evaluate")
  return made


if __name__ == "__main__":
  study.start("evaluate", define_flags, run, has_subject=False)
