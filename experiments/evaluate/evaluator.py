"""Answers and scores benchmarks with every setting."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from experiments.evaluate import loading, report
from experiments.evaluate.answers import TaskAnswerer, prompts_of, read_rows, rows_path
from experiments.evaluate.harness import PREFIX, HarnessResults, HarnessTask, Recorded
from experiments.evaluate.scores import Results
from experiments.evaluate.tasks.task import Task
from experiments.shared import study, tabular
from himap_jax.checkpoint import LoadedModel, OpenCheckpoint
from himap_jax.engine import sharding
from himap_jax.errors import UserError
from himap_jax.generation import InputConfig
from himap_jax.harness.responder import Responder
from himap_jax.harness.settings import Settings
from himap_jax.pruning.cost import ModelSizes
from himap_jax.pruning.schedule import Schedule
from himap_jax.run import command


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
