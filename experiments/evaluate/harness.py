"""Tasks of lmms-eval, by its own questions and metrics, answered by one loaded model for a whole grid of settings."""

import dataclasses
import difflib
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.evaluate.answers import Row, read_rows
from experiments.evaluate.libraries import library
from experiments.evaluate.report import PREVIEWED
from experiments.evaluate.scores import REFERENCE, relative_costs
from experiments.shared import kept, tabular
from experiments.shared.statistics import resample, with_interval
from himap_jax.errors import UserError
from himap_jax.harness.responder import Answer, Continuation, Loss, Question, Request, Responder, pictures_of
from himap_jax.harness.settings import Settings
from himap_jax.pruning.schedule import Schedule
from himap_jax.pruning.sizes import ModelSizes
from himap_jax.run.writer import OutputWriter

PREFIX = "lmms:"  # of the names of these tasks
NOT_ANSWERED = "it cannot be answered; a warning said why"


class Recorded:
  """A responder whose responses are kept in a file; only what is not in the file is asked.

  A response belongs to its prompt, its pictures, its generation config and `subject`, all else that it depends on. A
  request that could not be answered has a row with an `error`, and is asked again where there is a responder.
  """

  def __init__(self, path: pathlib.Path, subject: Mapping[str, Any], settings: Settings, responder: Responder | None):
    """Without a responder, a request that is not in the file is a `UserError`."""
    self.settings = settings
    self.used: dict[str, Row] = {}
    self._path, self._responder = path, responder
    self._subject = json.dumps(subject, sort_keys=True)
    path.parent.mkdir(parents=True, exist_ok=True)

  def answers(self, questions: Sequence[Question]) -> Iterator[tuple[Question, Answer]]:
    for question, row in self._responses("answers", questions):
      yield question, Answer(*(row[name] for name in Answer._fields))

  def losses(self, continuations: Sequence[Continuation]) -> Iterator[tuple[Continuation, Loss]]:
    for continuation, row in self._responses("losses", continuations):
      yield continuation, Loss(*(row[name] for name in Loss._fields))

  def _responses(self, kind: str, requests: Sequence[Request]) -> Iterator[tuple[Request, Row]]:
    keys = {request.place: self._key(request) for request in requests}
    asked_again = set() if self._responder is None else set(keys.values())

    def is_stale(row: Row) -> bool:
      return row["error"] is not None and row["id"] in asked_again

    with OutputWriter(self._path, resume=True, is_stale=is_stale) as writer:
      rows = {key: row for key, row in read_rows(self._path).items() if not is_stale(row)}
      for request in requests:
        row = rows.get(keys[request.place])
        if row is not None and row["error"] is None:
          yield request, self._use(row)
      missing = [request for request in requests if keys[request.place] not in rows]
      if missing and self._responder is None:
        raise UserError(f"--score_only: {self._path} lacks {len(missing)} of {len(requests)} answers")
      failed = {keys[request.place] for request in missing}
      for request, response in getattr(self._responder, kind)(missing) if missing else ():
        key = keys[request.place]
        failed.remove(key)
        row = {"id": key, "answer": None, "error": None, "digest": key, **response._asdict()}
        writer.write([row])
        yield request, self._use(row)
      writer.write({"id": key, "answer": None, "error": NOT_ANSWERED, "digest": key} for key in sorted(failed))

  def _use(self, row: Row) -> Row:
    self.used[row["id"]] = row
    return row

  def _key(self, request: Request) -> str:
    """A digest of all that a response depends on; a question's place seeds methods that choose at random."""
    own = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
    del own["pictures"]
    digest = hashlib.sha256(f"{self._subject}{own}".encode())
    try:
      for picture in pictures_of(request):
        digest.update(f"{picture.size}".encode() + picture.tobytes())
    except (UserError, OSError):
      digest.update(b"unreadable")  # the responder says why
    return digest.hexdigest()


class HarnessRun(NamedTuple):
  """lmms-eval's results of one setting.

  Attributes:
    results: metrics, such as `exact_match,none`, by the name of a task or group.
    samples: by the name of a task.
    rows: the responses that they were made of.
  """

  results: Mapping[str, Mapping[str, Any]]
  samples: Mapping[str, Sequence[Mapping[str, Any]]]
  rows: Sequence[Row]


@functools.cache
def _task_manager(include_path: str | None) -> Any:
  """lmms-eval's index of tasks, which takes seconds to build."""
  return library("lmms_eval.tasks", "a task of lmms-eval").TaskManager("WARNING", include_path=include_path)


@dataclasses.dataclass(frozen=True)
class HarnessTask:
  """A task, or a group of tasks, of lmms-eval.

  Attributes:
    name: lmms-eval's.
    include_path: a directory with more tasks, as of lmms-eval's flag.
  """

  name: str
  include_path: str | None = None

  def check(self) -> None:
    """Raises `UserError` if lmms-eval is missing or has no such task."""
    manager = _task_manager(self.include_path)
    if self.name not in manager.all_tasks:
      near = ", ".join(difflib.get_close_matches(self.name, manager.all_tasks, 5)) or "none of a similar name"
      raise UserError(f"lmms-eval has no task {self.name!r}; it has {near}")

  def run(self, recorded: Recorded, limit: int | None) -> HarnessRun:
    """Answers and scores the task with one setting."""
    harness_model = library("himap_jax.harness.lmms", self.name).HarnessModel
    evaluate = library("lmms_eval.evaluator", self.name).simple_evaluate
    model = harness_model(recorded)
    result = evaluate(
      model, tasks=[self.name], task_manager=_task_manager(self.include_path), limit=limit, bootstrap_iters=0
    )
    return HarnessRun(result["results"], result["samples"], list(recorded.used.values()))


def _answer(sample: Mapping[str, Any]) -> Any:
  """What a sample's answer is compared by: the index of the least loss of several choices, or the responses."""
  responses = sample["filtered_resps"]
  is_choice = len(responses) > 1 and all(isinstance(one, tuple) for one in responses)
  return min(range(len(responses)), key=lambda index: responses[index][0]) if is_choice else responses


@dataclasses.dataclass(frozen=True)
class HarnessResults:
  """The results of `HarnessTask.run` for some settings, by their labels."""

  runs: Mapping[str, HarnessRun]
  schedules: Mapping[str, Schedule]
  sizes: ModelSizes

  def rows(self, *, seed: int = 0) -> list[tabular.Row]:
    """A row for every setting of every task and group, with all of lmms-eval's metrics in its units."""
    names = next(iter(self.runs.values())).results
    return [self._row(name, label, seed) for name in names for label in self.runs]

  def _row(self, name: str, label: str, seed: int) -> tabular.Row:
    metrics = self._metrics(name, label)
    samples = self.runs[label].samples.get(name, [])
    row: tabular.Row = {"task": f"{PREFIX}{name}", "setting": label, "questions": len(samples) or None}
    if metrics:
      metric, row["score"] = next(iter(metrics.items()))
      settings = dict.fromkeys((REFERENCE, label) if REFERENCE in self.runs else (label,))
      values = [self._values(name, own, metric) for own in settings]
      if REFERENCE in self.runs:
        row["difference"] = row["score"] - self._metrics(name, REFERENCE)[metric]
      if all(own is not None for own in values):
        resampled = resample(np.array(values), seed=seed)
        row |= with_interval("score", row["score"], resampled[:, -1])
        if REFERENCE in self.runs:
          row |= with_interval("difference", row["difference"], resampled[:, -1] - resampled[:, 0])
    row |= relative_costs(self.runs[label].rows, self.schedules[label], self.sizes)
    if REFERENCE in self.runs and samples:
      pairs = zip(samples, self.runs[REFERENCE].samples[name], strict=True)
      row["agreement"] = float(np.mean([_answer(own) == _answer(other) for own, other in pairs]))
    return row | {f"{name}: {metric}": value for metric, value in metrics.items()}

  def _metrics(self, name: str, label: str) -> dict[str, float]:
    """Numbers without their errors, by metric."""
    own = self.runs[label].results[name].items()
    numbers = {key: value for key, value in own if isinstance(value, int | float) and "_stderr" not in key}
    return {key.partition(",")[0]: float(value) for key, value in numbers.items() if "," in key}

  def _values(self, name: str, label: str, metric: str) -> list[float] | None:
    """The metric of every sample, if its mean is the score."""
    values = [sample.get(metric) for sample in self.runs[label].samples.get(name, [])]
    if not values or not all(isinstance(value, int | float) for value in values):
      return None
    return values if np.isclose(np.mean(values), self._metrics(name, label)[metric]) else None

  def preview(self, label: str) -> str:
    """The first samples with prompt, answer and metrics, so that a wrong prompt is seen early."""
    lines = []
    for name, samples in self.runs[label].samples.items():
      lines.append(f"{PREFIX}{name}, {label}: the first {min(PREVIEWED, len(samples))} of {len(samples)}")
      lines += [
        f"  {own['arguments'][0]!r} → {own['filtered_resps']!r} (right: {own['target']!r})"
        for own in samples[:PREVIEWED]
      ]
    return "\n".join(lines)

  def write_samples(self, output: pathlib.Path) -> None:
    """Writes lmms-eval's samples of every setting as a JSONL file."""
    for label, run in self.runs.items():
      for name, samples in run.samples.items():
        with open(output / f"lmms-{name}-{kept.file_name(label)}.jsonl", "w", encoding="utf-8") as file:
          file.writelines(json.dumps(sample, ensure_ascii=False, default=str) + "\n" for sample in samples)
