"""What the answers and scores under manipulation amount to."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments import statistics, tabular
from experiments.importance.study import Pair
from experiments.question_sets import is_right

Row = dict[str, Any]


def rows(pairs: Sequence[Pair], answers: Mapping[str, Sequence[tuple[str, str]]], *, seed: int) -> list[Row]:
  """A row for every schedule: how often the answer is right, and whose answer without pruning it is."""
  plain = answers["no pruning"]
  result = []
  for name, given in answers.items():
    shares = {
      "right": [
        is_right(a, q.answer)
        for pair, own in zip(pairs, given, strict=True)
        for q, a in zip(pair.questions, own, strict=True)
      ],
      "as the row's own picture unpruned": [
        is_right(own[i], unpruned[i]) for own, unpruned in zip(given, plain, strict=True) for i in range(2)
      ],
      "as the partner's picture unpruned": [
        is_right(own[i], unpruned[1 - i]) for own, unpruned in zip(given, plain, strict=True) for i in range(2)
      ],
    }
    result.append({"schedule": name} | _with_intervals(shares, len(pairs), seed))
  return result


def correlation_row(correlations: Sequence[Mapping[str, float]], *, seed: int) -> Row:
  """The mean correlations."""
  values = {name: [row[name] for row in correlations] for name in correlations[0]}
  return _with_intervals(values, len(correlations) // 2, seed)


def _with_intervals(values: Mapping[str, Sequence[float]], num_pairs: int, seed: int) -> Row:
  """Means with 95% bootstrap intervals over pairs."""
  row: Row = {}
  for name, each in values.items():
    by_pair = np.asarray(each, np.float64).reshape(num_pairs, 2).mean(axis=1)
    row |= statistics.with_interval(name, by_pair.mean(), statistics.resample(by_pair[None], seed=seed)[:, 0])
  return row


def write_markdown(path: pathlib.Path, measured: Sequence[Row], correlations: Row, heading: str) -> None:
  """Writes both tables."""

  def names(row: Row) -> list[str]:
    return [name for name in row if name != "schedule" and not name.endswith(("_low", "_high"))]

  def cells(row: Row, form: str) -> list[str]:
    return [tabular.with_interval(row, name, form) for name in names(row)]

  content = [
    heading,
    "",
    "## Answers",
    "",
    *tabular.markdown(("", *names(measured[0])), ([row["schedule"], *cells(row, ".1%")] for row in measured)),
    "",
    "## Scores of pictures whose middle comes from another",
    "",
    "Correlation of the first stage's scores with those of the row's own picture and of the other one.",
    "",
    *tabular.markdown(names(correlations), [cells(correlations, ".2f")]),
  ]
  path.write_text("\n".join(content) + "\n", encoding="utf-8")
