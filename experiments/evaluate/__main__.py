"""How well does a model with pruning do on the field's benchmarks?

    python -m experiments.evaluate --tasks=textvqa,pope,mme --settings=none,himap,fastv --checkpoint=… --workdir=… \\
      --output=…

Every task is answered with every setting, by the prompts and scored by the metrics that its authors use; a task
`lmms:NAME` is lmms-eval's. Repeating the command resumes it; `--score_only` scores the answers that are there and reads
no weights.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from absl import flags

from experiments.compare.grid import parse_setting
from experiments.evaluate import loading, report
from experiments.evaluate.answers import TaskAnswerer, prompts_of, read_rows, rows_path
from experiments.evaluate.harness import PREFIX, HarnessResults, HarnessTask, Recorded
from experiments.evaluate.paper import TABLES, with_paper
from experiments.evaluate.scores import REFERENCE, Results
from experiments.evaluate.tasks import TASKS, find_task
from experiments.evaluate.tasks.task import Task
from experiments.shared import study, tabular
from himap_jax import checkpoint
from himap_jax.checkpoint import LoadedModel, OpenCheckpoint
from himap_jax.engine import sharding
from himap_jax.engine.accounting import method_inputs, model_sizes
from himap_jax.errors import UserError
from himap_jax.generation import InputConfig
from himap_jax.harness.responder import Responder
from himap_jax.harness.settings import Settings
from himap_jax.pruning.cost import ModelSizes
from himap_jax.pruning.schedule import Schedule
from himap_jax.run import command


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
  flags.DEFINE_enum("dtype", "bfloat16", sorted(command.DTYPES), "Dtype of parameters and activations.")
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
  evaluator = Evaluator(opened, values, schedules, sizes)
  rows = [row for task in tasks for row in evaluator.rows(task)]
  rows += [row for task in harness_tasks for row in evaluator.harness_rows(task)]
  if values.paper_table:
    rows = with_paper(rows, values.paper_table)
  return study.Report(f"{values.limit or 'all'} questions of a task", report.summary(rows, tasks), {"evaluate": rows})


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Answers and scores tasks with every setting; the weights are loaded once, and not for `--score_only`.

  Attributes:
    values: of the flags.
    schedules: by the label of a setting.
  """

  opened: OpenCheckpoint
  values: Any
  schedules: Mapping[str, Schedule]
  sizes: ModelSizes

  def rows(self, task: Task) -> list[tabular.Row]:
    """The scores of one of our tasks."""
    samples = functools.partial(loading.load, task, self.values.data, limit=self.values.limit)
    workdir = study.directory("workdir")
    if not self.values.score_only:
      answerer = TaskAnswerer(self._loaded, self._inputs, workdir, self._subject, self.values.seed)
      answerer.answer(task, prompts_of(samples), self.schedules)
    answers = {label: read_rows(rows_path(workdir, task.name, label)) for label in self.schedules}
    for label, own in answers.items():
      if self.values.score_only and not own:
        raise UserError(f"--score_only: {workdir} has no answers to {task.name} with {label}")
    results = Results(task, report.without_pictures(samples()), answers, self.schedules, self.sizes)
    print(report.preview(results, next(iter(self.schedules))), flush=True)
    report.write_samples(study.directory("output"), results)
    return results.rows(seed=self.values.seed)

  def harness_rows(self, task: HarnessTask) -> list[tabular.Row]:
    """The scores of one of lmms-eval's tasks."""
    names = ("batch_size", "prompt_template", "max_new_tokens", "seed")
    settings = Settings(**{name: self.values[name].value for name in names})
    runs = {}
    for label, schedule in self.schedules.items():
      print(f"{PREFIX}{task.name}, {label}", flush=True)
      responder = None
      if not self.values.score_only:
        processor = self._loaded.prompts(settings.prompt_template, settings.max_image_tokens)
        responder = Responder(self._loaded, processor, schedule, settings)
      path = rows_path(study.directory("workdir"), f"lmms-{task.name}", label)
      recorded = Recorded(path, self._subject | {"setting": label}, settings, responder)
      runs[label] = task.run(recorded, self.values.limit)
    results = HarnessResults(runs, self.schedules, self.sizes)
    print(results.preview(next(iter(runs))), flush=True)
    results.write_samples(study.directory("output"))
    return results.rows(seed=self.values.seed)

  @functools.cached_property
  def _loaded(self) -> LoadedModel:
    command.use_compilation_cache(command.compilation_cache_dir(self.values.compilation_cache_dir))
    dtype = command.DTYPES[self.values.dtype]
    axes = sharding.choose_mesh(self.opened.config, self.opened.num_bytes(dtype), self.values.batch_size)
    with command.out_of_memory_is_user_error():
      return self.opened.restore(dtype=dtype, mesh=sharding.make_mesh(**axes))

  @property
  def _inputs(self) -> InputConfig:
    return InputConfig(self.values.prompt_template, batch_size=self.values.batch_size)

  @functools.cached_property
  def _subject(self) -> dict[str, Any]:
    """All that answers depend on besides the questions and the pruning."""
    names = ("dtype", "prompt_template", "image_aspect_ratio", "seed")
    return {"checkpoint": self.opened.digest()} | {name: self.values[name].value for name in names}


if __name__ == "__main__":
  study.start("evaluate", define_flags, run, has_subject=False)
