"""Answers and scores benchmarks with every setting."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

from experiments.evaluate import loading, report
from experiments.evaluate.answers import TaskAnswerer, check_rows, contract_of, prompts_of, read_rows, rows_path
from experiments.evaluate.harness import PREFIX, HarnessResults, HarnessTask, Recorded
from experiments.evaluate.scores import Results
from experiments.evaluate.tasks.task import Task
from experiments.shared import tabular
from himap_jax import checkpoint
from himap_jax.checkpoint import LoadedModel, OpenCheckpoint
from himap_jax.errors import UserError
from himap_jax.generation import InputConfig
from himap_jax.harness.responder import Responder
from himap_jax.harness.settings import Settings
from himap_jax.pruning.schedule import Schedule
from himap_jax.pruning.sizes import ModelSizes
from himap_jax.run.contract import schedule_settings
from himap_jax.run.user_errors import out_of_memory_is_user_error


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """Which questions are answered, how, and where answers and results are written.

  Attributes:
    data: a directory with the data set; None: the hub.
    limit: questions of a task; None: all.
    score_only: scores the answers in `workdir`, which must be of these settings, without a model.
  """

  settings: Settings
  workdir: pathlib.Path
  output: pathlib.Path
  data: str | None = None
  limit: int | None = None
  score_only: bool = False


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Answers and scores tasks with every setting; the weights are loaded once.

  Attributes:
    schedules: by the label of a setting.
  """

  opened: OpenCheckpoint
  config: EvaluationConfig
  schedules: Mapping[str, Schedule]
  sizes: ModelSizes

  def check(self, task: Task) -> None:
    """Raises `UserError` if one of our tasks lacks its data or what scores it, which its first sample tells."""
    sample = next(loading.load(task, self.config.data, limit=1))
    task.scored([sample], [""])

  def rows(self, task: Task) -> list[tabular.Row]:
    """The scores of one of our tasks."""
    config = self.config
    samples = functools.partial(loading.load, task, config.data, limit=config.limit)
    if not config.score_only:
      inputs = InputConfig(config.settings.prompt_template, batch_size=config.settings.batch_size)
      answerer = TaskAnswerer(self._loaded, inputs, config.workdir, self._subject, config.settings.seed)
      answerer.answer(task, prompts_of(samples), self.schedules)
    answers = {label: read_rows(rows_path(config.workdir, task.name, label)) for label in self.schedules}
    for label, own in answers.items():
      if config.score_only and not own:
        raise UserError(f"--score_only: {config.workdir} has no answers to {task.name} with {label}")
    if config.score_only:
      prompts = prompts_of(samples)
      for label, own in answers.items():
        missing = sum(key not in own for key in prompts.keys)
        if missing:
          raise UserError(
            f"--score_only: {config.workdir} lacks {missing} of {len(prompts)} answers to {task.name} with {label}; "
            "the same command without --score_only adds them"
          )
        contract = contract_of(config.workdir, self._subject, task, label, self.schedules[label], prompts)
        check_rows(contract, own.values())
    results = Results(task, report.without_pictures(samples()), answers, self.schedules, self.sizes)
    print(report.preview(results, next(iter(self.schedules))), flush=True)
    report.write_samples(config.output, results)
    return results.rows(seed=config.settings.seed)

  def harness_rows(self, task: HarnessTask) -> list[tabular.Row]:
    """The scores of one of lmms-eval's tasks."""
    config, settings, runs = self.config, self.config.settings, {}
    for label, schedule in self.schedules.items():
      print(f"{PREFIX}{task.name}, {label}", flush=True)
      responder = None
      if not config.score_only:
        processor = self._loaded.prompts(settings.prompt_template, settings.max_image_tokens)
        responder = Responder(self._loaded, processor, schedule, settings)
      path = rows_path(config.workdir, f"lmms-{task.name}", label)
      subject = self._subject | {"setting": label} | schedule_settings(schedule)
      recorded = Recorded(path, subject, settings, responder)
      runs[label] = task.run(recorded, config.limit)
    results = HarnessResults(runs, self.schedules, self.sizes)
    print(results.preview(next(iter(runs))), flush=True)
    results.write_samples(config.output)
    return results.rows(seed=settings.seed)

  @functools.cached_property
  def _loaded(self) -> LoadedModel:
    digest, dtype = self._subject["checkpoint"], checkpoint.DTYPES[self.config.settings.dtype]
    mesh = self.opened.make_mesh(dtype, self.config.settings.batch_size)
    with out_of_memory_is_user_error():
      loaded = self.opened.restore(dtype=dtype, mesh=mesh)
    self.opened.check_unchanged(digest)
    return loaded

  @functools.cached_property
  def _subject(self) -> dict[str, Any]:
    """All that answers depend on besides the questions and the pruning."""
    names = ("dtype", "prompt_template", "image_aspect_ratio", "seed")
    return {"checkpoint": self.opened.digest()} | {name: getattr(self.config.settings, name) for name in names}
