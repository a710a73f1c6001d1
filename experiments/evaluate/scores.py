"""The table of an evaluation: scores of every task and setting, with intervals, costs and times relative to no pruning.

Axes: Q questions.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from experiments.evaluate.answers import Row
from experiments.evaluate.metrics import captions
from experiments.evaluate.tasks.task import Sample, Scored, Task, mean
from experiments.shared import tabular
from experiments.shared.statistics import resample, with_interval
from himap_jax.pruning.cost import costs
from himap_jax.pruning.schedule import Schedule
from himap_jax.pruning.sizes import ModelSizes

REFERENCE = "none"
RESAMPLES = 1000  # each is scored anew, since not all scores are means over questions


@dataclasses.dataclass(frozen=True)
class Results:
  """The answers of some settings to a task; those of no pruning are the first.

  Attributes:
    answers: rows by the setting's label and the sample's id.
    schedules: by label.
  """

  task: Task
  samples: Sequence[Sample]
  answers: Mapping[str, Mapping[str, Row]]
  schedules: Mapping[str, Schedule]
  sizes: ModelSizes

  @functools.cached_property
  def scored(self) -> dict[str, list[Scored]]:
    """Every setting's answers with their scores."""
    return {
      label: self.task.scored(self.samples, [rows.get(sample.id, {}).get("answer") for sample in self.samples])
      for label, rows in self.answers.items()
    }

  def rows(self, *, seed: int = 0) -> list[tabular.Row]:
    """Every figure of every setting."""
    scored = self.scored
    resampled = {label: self._resampled(own, seed) for label, own in scored.items()}
    rows = []
    for label, own in scored.items():
      row: tabular.Row = {"task": self.task.name, "setting": label, "questions": len(own)}
      row["errors"] = sum(one.answer is None for one in own)
      values = self.task.values(own)
      if values:
        metric = next(name for name in values if name.removeprefix(captions.APPROXIMATE) == self.task.metric)
        row |= with_interval("score", values[metric], resampled[label])
        if REFERENCE in scored:
          difference = values[metric] - self.task.values(scored[REFERENCE])[metric]
          row |= with_interval("difference", difference, resampled[label] - resampled[REFERENCE])
      used = (self.answers[label].get(sample.id, {}) for sample in self.samples)
      row |= relative_costs(used, self.schedules[label], self.sizes)
      if REFERENCE in scored:
        pairs = zip(own, scored[REFERENCE], strict=True)
        same = [a.answer == b.answer and a.answer is not None for a, b in pairs]
        row["agreement"] = float(np.mean(same))
      rows.append(row | {f"{self.task.name}: {name}": value for name, value in values.items()})
    return rows

  def _resampled(self, scored: Sequence[Scored], seed: int) -> np.ndarray:
    """The score of as many groups of questions drawn with replacement, the same draws for every setting.

    Questions about one picture are drawn together, and those that are scored together. Those of `score_all` keep their
    scores in the whole set.
    """
    own = [one for one in scored if one.score is not None]
    has_mean = self.task.aggregate is mean or self.task.score_all is not None
    if own and has_mean and not any(one.sample.group for one in own):
      pictures = [one.sample.picture or one.sample.id for one in own]
      values = np.array([[one.score for one in own]])
      return 100 * resample(values, groups=pictures, seed=seed, resamples=RESAMPLES)[:, 0]
    groups: dict[str, list[Scored]] = {}
    for number, one in enumerate(own):
      groups.setdefault(one.sample.group or one.sample.picture or f"#{number}", []).append(one)
    parts, rng = list(groups.values()), np.random.default_rng(seed)
    if not parts:
      return np.zeros(0)

    @functools.cache
    def copy(index: int, number: int) -> list[Scored]:
      """A group that is drawn once more is another group."""
      samples = [dataclasses.replace(one.sample, group=f"{number}#{one.sample.group}") for one in parts[index]]
      return [one._replace(sample=sample) for one, sample in zip(parts[index], samples, strict=True)]

    values = []
    for draw in rng.integers(len(parts), size=(RESAMPLES, len(parts))):
      drawn = zip(*np.unique(draw, return_counts=True), strict=True)
      own = [one for index, times in drawn for number in range(times) for one in copy(index, number)]
      values.append(self.task.aggregate(own)[self.task.metric])
    return np.array(values)


def relative_costs(rows: Iterable[Row], schedule: Schedule, sizes: ModelSizes) -> tabular.Row:
  """FLOPs of the prefill, relative to no pruning of the same rows, and the median seconds of a row."""
  own, plain, seconds = 0, 0, []
  for row in rows:
    if row.get("counts"):
      counts = row["counts"]
      tokens = counts["image_tokens"], counts["text_tokens"]
      own += costs(sizes, schedule.with_counts(counts["kept"]), *tokens, num_pictures=counts["tiles"]).prefill
      plain += costs(sizes, Schedule(), *tokens, num_pictures=counts["tiles"]).prefill
      seconds.append(row["timing"]["prefill_seconds"] + row["timing"]["decode_seconds"])
  return {"flops": own / plain if plain else None, "seconds": float(np.median(seconds)) if seconds else None}
