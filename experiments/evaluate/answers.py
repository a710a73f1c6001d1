"""Answers to the samples of tasks, one file of rows for each task and setting; those in the work directory are kept."""

import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool

from experiments.evaluate.tasks.task import Sample, Task
from experiments.shared import kept
from himap_jax.checkpoint import LoadedModel
from himap_jax.engine.engine import GenerationConfig
from himap_jax.errors import UserError
from himap_jax.families.family import Processor
from himap_jax.generation import InputConfig, make_batcher
from himap_jax.inputs import ImageSize
from himap_jax.pruning.schedule import Schedule
from himap_jax.run.answering import Answerer
from himap_jax.run.contract import Comparison, Contract, schedule_settings
from himap_jax.run.output import Output
from himap_jax.run.picture_sizes import image_sizes
from himap_jax.run.pictures import PictureFiles
from himap_jax.run.prompts import Prompt, Prompts
from himap_jax.run.writer import is_torn

Row = Mapping[str, Any]


def prompts_of(samples: Callable[[], Iterator[Sample]]) -> Prompts:
  """The prompts of samples, which are read anew each time."""

  def where(wanted: Bool[np.ndarray, "N"]) -> Iterator[Prompt]:
    for sample in itertools.compress(samples(), wanted):
      images = tuple(str(image.absolute()) if isinstance(image, pathlib.Path) else image for image in sample.images)
      yield Prompt(sample.id, images, sample.question, error=sample.error)

  return Prompts([sample.id for sample in samples()], where)


@dataclasses.dataclass(frozen=True)
class TaskAnswerer:
  """Answers the samples of tasks with one model.

  Attributes:
    settings: all that answers depend on besides the task and the pruning.
  """

  loaded: LoadedModel
  inputs: InputConfig
  workdir: pathlib.Path
  settings: Mapping[str, Any]
  seed: int = 0

  def answer(self, task: Task, prompts: Prompts, schedules: Mapping[str, Schedule]) -> None:
    """Answers, with the schedule of every label, the samples that have no answer yet."""
    processor = self.loaded.prompts(self.inputs.prompt_template, self.inputs.max_image_tokens)
    sizes = functools.cache(lambda: image_sizes(prompts, PictureFiles(), processor))
    for label, schedule in schedules.items():
      print(f"{task.title}, {label}", flush=True)
      contract = contract_of(self.workdir, self.settings, task, label, schedule, prompts)
      contract.output.parent.mkdir(parents=True, exist_ok=True)
      with Output(contract, resume=True) as output:
        if not output.answered.all():
          self._answerer(task, processor, sizes(), schedule).answer_all(output)

  def _answerer(self, task: Task, processor: Processor, sizes: Mapping[ImageSize, int], schedule: Schedule) -> Answerer:
    loaded, generation = self.loaded, GenerationConfig(task.max_new_tokens, seed=self.seed)
    buckets = self.inputs.prompt_buckets
    batcher = make_batcher(loaded, processor, sizes, buckets, task.max_new_tokens, schedule)
    engine = loaded.engine(schedule, generation, self.inputs.batch_sizes())
    return Answerer(processor, batcher, engine, frozenset({"timing", "counts"}))


def rows_path(workdir: pathlib.Path, task: str, label: str) -> pathlib.Path:
  """The file of a setting's answers to a task."""
  return workdir / task / f"{kept.file_name(label)}.jsonl"


def contract_of(
  workdir: pathlib.Path, settings: Mapping[str, Any], task: Task, label: str, schedule: Schedule, prompts: Prompts
) -> Contract:
  """What a setting's answers to a task must match; `settings` as of `TaskAnswerer`."""
  settings = {**settings, "task": task.name, "setting": label, "max_new_tokens": task.max_new_tokens}
  settings |= schedule_settings(schedule)
  return Contract(rows_path(workdir, task.name, label), settings, prompts, advice="use another --workdir")


def check_rows(contract: Contract, rows: Iterable[Row]) -> None:
  """Raises `UserError` if answers were made with other settings, or to another question or picture."""
  comparison = Comparison(contract)
  for row in rows:
    comparison.is_failed(row)
  changed = comparison.changed()
  if changed:
    raise UserError(f"{contract.output}: {len(changed)} questions or pictures have changed; {contract.advice}")


def read_rows(path: pathlib.Path) -> dict[str, Row]:
  """The rows of a file by id, without a torn one at the end; none if it does not exist."""
  lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
  return {str(row["id"]): row for row in map(json.loads, itertools.filterfalse(is_torn, lines))}
