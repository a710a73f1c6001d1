"""Compares the rows that one method answers in several forms of weights."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.question_sets import Question, is_right
from experiments.shared import statistics, tabular
from himap_jax.errors import UserError

Answers = Mapping[str, Mapping[str, Any]]


def read(output: pathlib.Path) -> Answers:
  """The answered rows of an output by id."""
  rows = map(json.loads, output.read_text(encoding="utf-8").splitlines())
  return {row["id"]: row for row in rows if row["error"] is None}


def rows(method: str, answers: Mapping[str, Answers], questions: Sequence[Question]) -> list[tabular.Row]:
  """One row for each form of weights, the reference first, over the questions that all forms have answered.

  `same_answer` is the share of questions with the reference's answer. `same_kept` is the share that keep the same image
  tokens at every stage, and `overlap` the share of the reference's image tokens that are kept, the mean over stages and
  questions; both are missing if nothing is pruned. `right` is the share of right answers, and `difference` how far it
  is above the reference's; both are missing if a question has no known answer. Intervals are 95% bootstrap intervals
  over pictures.

  Args:
    answers: of each form, the rows by id, with `answer` and `kept`, the indices of the kept image tokens at each stage;
      the first form is the reference.

  Raises:
    UserError: no question was answered in every form.
  """
  asked = [own for own in questions if all(own.id in answered for answered in answers.values())]
  if not asked:
    raise UserError(f"{method}: no question was answered with all forms of weights ({', '.join(answers)})")
  pictures, is_known = [own.image for own in asked], all(own.answer for own in asked)
  by_form = {form: [answered[own.id] for own in asked] for form, answered in answers.items()}
  reference = next(iter(by_form.values()))
  right = {
    form: np.array([is_right(row["answer"], own.answer) for row, own in zip(answered, asked, strict=True)], float)
    for form, answered in by_form.items()
  }
  table: list[tabular.Row] = []
  for form, answered in by_form.items():
    row: dict[str, Any] = {"method": method, "weights": form, "questions": len(asked)}
    if is_known:
      row["right"] = float(right[form].mean())
    if table:
      pairs = zip(reference, answered, strict=True)
      compared = {"same_answer": np.array([one["answer"] == two["answer"] for one, two in pairs], float)}
      if is_known:
        compared["difference"] = right[form] - next(iter(right.values()))
      for name, values in compared.items():
        resampled = statistics.resample(values[None], groups=pictures)
        row |= statistics.with_interval(name, float(values.mean()), resampled[:, 0])
      row |= _kept(reference, answered)
    table.append(row)
  return table


def _kept(reference: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  pairs = [(one["kept"], two["kept"]) for one, two in zip(reference, other, strict=True)]
  stages = [(set(a), set(b)) for one, two in pairs for a, b in zip(one, two, strict=True)]
  if not stages:
    return {}
  return {
    "same_kept": float(np.mean([one == two for one, two in pairs])),
    "overlap": float(np.mean([len(a & b) / len(a) for a, b in stages if a])),
  }


def summary(table: Sequence[tabular.Row]) -> list[str]:
  """The lines of a Markdown table."""
  columns = {
    "method": "{method}",
    "weights": "{weights}",
    "same answer": tabular.with_interval("same_answer", ".1%"),
    "same kept tokens": "{same_kept:.1%}",
    "overlap of kept tokens": "{overlap:.1%}",
    "right": "{right:.1%}",
    "difference": tabular.with_interval("difference", "+.1%"),
  }
  return tabular.formatted(table, columns)
