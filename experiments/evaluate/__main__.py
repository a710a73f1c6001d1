"""How well does a model with pruning do on the field's benchmarks?

    python -m experiments.evaluate --tasks=textvqa,pope,mme --settings=none,himap,fastv --checkpoint=… --workdir=… \\
      --output=…

Every task is answered with every setting, by the prompts and scored by the metrics that its authors use. Repeating the
command resumes it; `--score_only` scores the answers that are there and reads no weights.
"""

import functools
import pathlib
from typing import Any

from absl import flags

from experiments.compare.grid import parse_setting
from experiments.evaluate import loading, report
from experiments.evaluate.answers import Evaluator, prompts_of, read_rows, rows_path
from experiments.evaluate.scores import REFERENCE, Results
from experiments.evaluate.tasks import TASKS, find_task
from experiments.shared import study
from himap_jax import checkpoint
from himap_jax.checkpoint import OpenCheckpoint
from himap_jax.engine import sharding
from himap_jax.engine.accounting import method_inputs, model_sizes
from himap_jax.errors import UserError
from himap_jax.generation import InputConfig
from himap_jax.run import command


def define_flags() -> None:
  flags.DEFINE_list("tasks", None, f"Any of {', '.join(TASKS)}.", required=True)
  flags.DEFINE_list(
    "settings",
    [REFERENCE, "himap"],
    "Methods with their own settings, or settings such as himap@2/8:288/72 and fastv@2:50%.",
  )
  flags.DEFINE_string("checkpoint", "demo", "As in himap_jax.run.")
  flags.DEFINE_string(
    "data", None, "A directory with a data set as the hub lays it out or its official files; the hub by default."
  )
  flags.DEFINE_integer("limit", None, "Questions of every task; all by default.", lower_bound=1)
  flags.DEFINE_enum(
    "image_aspect_ratio",
    "checkpoint",
    checkpoint.ASPECT_RATIOS,
    "Whether pictures are padded to squares, as LLaVA-1.5's published scores need.",
  )
  flags.DEFINE_string("prompt_template", "chat", "As in himap_jax.run.")
  flags.DEFINE_enum("dtype", "bfloat16", sorted(command.DTYPES), "Dtype of parameters and activations.")
  flags.DEFINE_integer("batch_size", 8, "Rows per batch.", lower_bound=1)
  flags.DEFINE_integer("seed", 0, "Seed of methods that choose at random, and of the bootstrap.")
  flags.DEFINE_bool("score_only", False, "Score the answers in --workdir and answer no more questions.")
  flags.DEFINE_string("compilation_cache_dir", None, "As in himap_jax.run.")


def run(values: Any) -> study.Report:
  tasks = list(map(find_task, dict.fromkeys(values.tasks)))
  settings = {label: parse_setting(label) for label in values.settings}
  opened = checkpoint.open_checkpoint(values.checkpoint).with_aspect_ratio(values.image_aspect_ratio)
  workdir, rows = study.directory("workdir"), []
  evaluator = None if values.score_only else evaluator_of(opened, values, workdir)
  sizes = model_sizes(opened.config, opened.prompts(values.prompt_template).blank.images.pixels.shape[2:])
  schedules = {label: pruning.schedule(**method_inputs(opened.config)) for label, pruning in settings.items()}
  for task in tasks:
    samples = functools.partial(loading.load, task, values.data, limit=values.limit)
    if evaluator is not None:
      evaluator.answer(task, prompts_of(samples), schedules)
    answers = {label: read_rows(rows_path(workdir, task, label)) for label in settings}
    for label, own in answers.items():
      if evaluator is None and not own:
        raise UserError(f"--score_only: {workdir} has no answers to {task.name} with {label}")
    results = Results(task, report.without_pictures(samples()), answers, schedules, sizes)
    print(report.preview(results, next(iter(settings))), flush=True)
    rows += results.rows(seed=values.seed)
    report.write_samples(study.directory("output"), results)
  return study.Report(f"{values.limit or 'all'} questions of a task", report.summary(rows, tasks), {"evaluate": rows})


def evaluator_of(opened: OpenCheckpoint, values: Any, workdir: pathlib.Path) -> Evaluator:
  """Loads the model of the flags."""
  command.use_compilation_cache(command.compilation_cache_dir(values.compilation_cache_dir))
  inputs = InputConfig(values.prompt_template, batch_size=values.batch_size)
  dtype = command.DTYPES[values.dtype]
  axes = sharding.choose_mesh(opened.config, opened.num_bytes(dtype), values.batch_size)
  with command.out_of_memory_is_user_error():
    loaded = opened.restore(dtype=dtype, mesh=sharding.make_mesh(**axes))
  settings = {"checkpoint": opened.digest(), "dtype": values.dtype, "prompt_template": values.prompt_template}
  settings |= {"image_aspect_ratio": values.image_aspect_ratio, "seed": values.seed}
  return Evaluator(loaded, inputs, workdir, settings, values.seed)


if __name__ == "__main__":
  study.start("evaluate", define_flags, run, has_subject=False)
