"""Compares the output rows of two runs over the same questions."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Agreement(NamedTuple):
  """How far a run agrees with another.

  Attributes:
    num_rows: that both have answered.
    same_answers: share of rows with the same answer.
    same_kept: share of rows that keep the same image tokens at every stage; None if nothing is pruned.
    overlap: of the image tokens that the other keeps, the share that this one keeps, too; the mean over stages and rows.
  """

  num_rows: int
  same_answers: float
  same_kept: float | None
  overlap: float | None


def read(output: pathlib.Path) -> dict[Any, dict[str, Any]]:
  """The answered rows of an output by id."""
  rows = map(json.loads, output.read_text(encoding="utf-8").splitlines())
  return {row["id"]: row for row in rows if row["error"] is None}


def agreement(reference: Mapping[Any, Mapping[str, Any]], other: Mapping[Any, Mapping[str, Any]]) -> Agreement:
  """The agreement of rows with `answer` and `kept`, the indices of the kept image tokens at each stage."""
  pairs = [(reference[row_id], other[row_id]) for row_id in reference if row_id in other]
  answers = [one["answer"] == two["answer"] for one, two in pairs]
  stages = [(set(a), set(b)) for one, two in pairs for a, b in zip(one["kept"], two["kept"], strict=True)]
  if not stages:
    return Agreement(len(pairs), float(np.mean(answers)), None, None)
  overlaps = [len(a & b) / len(a) for a, b in stages if a]
  return Agreement(
    len(pairs),
    float(np.mean(answers)),
    float(np.mean([one["kept"] == two["kept"] for one, two in pairs])),
    float(np.mean(overlaps)),
  )


def table(rows: Sequence[tuple[str, str, Agreement]]) -> str:
  """A Markdown table of methods and forms of weights."""
  lines = [
    "| method | weights | questions | same answer | same kept tokens | overlap of kept tokens |",
    "|---|---|---|---|---|---|",
  ]
  for method, form, own in rows:
    kept = ["–" if share is None else f"{share:.1%}" for share in (own.same_kept, own.overlap)]
    lines.append(f"| {method} | {form} | {own.num_rows:,} | {own.same_answers:.1%} | {' | '.join(kept)} |")
  return "\n".join(lines)
