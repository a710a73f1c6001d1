"""What a benchmark is: where its records are, what the model is asked, and how its answers are scored."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Record = Mapping[str, Any]  # a row of a data set, with the columns of the hub's version


@dataclasses.dataclass(frozen=True)
class Sample:
  """A question, or the reason why it cannot be asked.

  Attributes:
    id: unique in its task.
    images: as the record holds them; `loading` makes them bytes of image files, or paths.
    question: the whole text for the model, without `<image>`, which goes before it.
    references: right answers; empty where the split has none.
    options: of a multiple choice, by their letters.
    category: for scores by category.
    group: questions that are scored together: of one picture, or of one question with its options in turn.
    number: the question's id in the form that the task's server wants it.
    picture: what its first picture is known by, empty if there is none; `loading` sets it.
    error: why it cannot be asked.
  """

  id: str
  images: tuple[Any, ...] = ()
  question: str = ""
  references: tuple[str, ...] = ()
  options: Mapping[str, str] = dataclasses.field(default_factory=dict)
  category: str = ""
  group: str = ""
  number: int | str = ""
  picture: str = ""
  error: str | None = None


class Scored(NamedTuple):
  """An answer, None where there is none, and its score from 0 to 1, None where the split has no references."""

  sample: Sample
  answer: str | None
  score: float | None


class Known(NamedTuple):
  """A score that a model is known to reach, in the task's unit."""

  value: float
  source: str


class Official(NamedTuple):
  """A data set in its authors' own files.

  Attributes:
    files: patterns; a directory that holds a file of each has this data set.
    read: yields records with the hub's columns, from the directory and the split; pictures are paths.
  """

  files: tuple[str, ...]
  read: Callable[[pathlib.Path, str], Iterator[Record]]


def mean(scored: Sequence[Scored], name: str = "accuracy") -> dict[str, float]:
  """The mean score in percent, then that of each category."""
  values = {"": [one.score for one in scored]}
  for one in scored:
    if one.sample.category:
      values.setdefault(one.sample.category, []).append(one.score)
  means = {category: 100 * sum(own) / len(own) for category, own in values.items()}
  return {f"{name}: {category}" if category else name: value for category, value in means.items()}


@dataclasses.dataclass(frozen=True)
class Task:
  """A benchmark.

  Attributes:
    name: in commands.
    title: in tables.
    repository: its id on the hub; `repositories` adds the owners under which the same data is published.
    config: the hub's configuration; None for its only one.
    split: the split that is scored or submitted.
    columns: that a record must have; references may be missing.
    sample: makes the sample of a record.
    score: of one answer, from 0 to 1.
    metric: the name of the score that a table shows, the first of `aggregate`'s.
    aggregate: from scored answers with references, at least one, to named values; percent, except MME's points.
    max_new_tokens: of an answer, which is greedy.
    known: scores by model.
    score_all: replaces `score` where an answer's score depends on all the others; takes "" for one that is missing. The
      mean of the scores is `metric`'s value.
    keeps: which records belong to the task.
    pictures: a configuration of the same split that holds the pictures apart, by `id` for a record's `imageId`.
    official: how to read the authors' own files.
    submission: from scored answers to the JSON that a server scores.
  """

  name: str
  title: str
  repository: str
  config: str | None
  split: str
  columns: tuple[str, ...]
  sample: Callable[[Record], Sample]
  score: Callable[[str, Sample], float]
  max_new_tokens: int
  metric: str = "accuracy"
  aggregate: Callable[[Sequence[Scored]], dict[str, float]] = mean
  known: Mapping[str, Known] = dataclasses.field(default_factory=dict)
  score_all: Callable[[Sequence[str], Sequence[Sample]], Sequence[float]] | None = None
  keeps: Callable[[Record], bool] = lambda record: True
  pictures: str | None = None
  official: Official | None = None
  submission: Callable[[Sequence[Scored]], Any] | None = None

  @property
  def repositories(self) -> tuple[str, ...]:
    """Where the data is published, the first as the default."""
    owner, _, name = self.repository.partition("/")
    return tuple(f"{own}/{name}" for own in (("lmms-lab", "lmms-lab-encoder") if owner == "lmms-lab" else (owner,)))

  def scored(self, samples: Sequence[Sample], answers: Sequence[str | None]) -> list[Scored]:
    """Scores answers; one that is missing scores 0."""
    pairs = [(answer, sample) for answer, sample in zip(answers, samples, strict=True) if sample.references]
    if self.score_all is None:
      values = iter([0.0 if answer is None else self.score(answer, sample) for answer, sample in pairs])
    else:
      values = iter(self.score_all([answer or "" for answer, _ in pairs], [sample for _, sample in pairs]))
    scores = [float(next(values)) if sample.references else None for sample in samples]
    return list(map(Scored, samples, answers, scores))

  def values(self, scored: Sequence[Scored]) -> dict[str, float]:
    """The task's scores; empty if no answer has one."""
    own = [one for one in scored if one.score is not None]
    return self.aggregate(own) if own else {}
