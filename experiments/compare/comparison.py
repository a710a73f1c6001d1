"""The figures of a comparison: one row per cell."""

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from experiments.compare.grid import REFERENCE, Cell
from experiments.compare.prompt_sizes import PromptSizes
from experiments.question_sets import Question, is_right, score
from experiments.shared.statistics import accuracy_by_type, group_sums, holm, paired_p_values, resample, with_interval
from himap_jax.errors import UserError
from himap_jax.pruning.cost import Costs
from himap_jax.pruning.schedule import Schedule

QUESTION_ONLY = "question only"
CONTROL = "random"
POSITIONS, RESTORE = "+positions", "+restore"
CONTROLS = (f"{CONTROL}{POSITIONS}", f"{CONTROL}{RESTORE}", CONTROL)
BY_TYPE, BY_SIZE = "accuracy: ", "accuracy at size "
SIZE_CLASSES = {"1": 1.25, "1.5": 1.75, "2": 2.5, "3": 3.5, "4": 6.0, "above 6": np.inf}  # and their upper bounds

_PAIR = re.compile(r"\s*(?P<label>.+?)\s*~\s*(?P<other>.+?)\s*( in (?P<types>.+))?")

Row = dict[str, Any]


class Pair(NamedTuple):
  """Two cells that are compared with each other, on questions of some types or, without types, on all."""

  label: str
  other: str
  types: tuple[str, ...] = ()


def match_pair(text: str) -> re.Match[str]:
  """The parts of a pair, whatever cells there are; raises `UserError` for what is none."""
  match = _PAIR.fullmatch(text)
  if not match:
    raise UserError(
      f"--pairs: {text!r} is not two cells, such as divprune 64~random 64, or divprune 64~random 64 in TYPE"
    )
  return match


def parse_pair(text: str, cells: Sequence[Cell], questions: Sequence[Question]) -> Pair:
  """Reads `LABEL~LABEL` or `LABEL~LABEL in TYPE/TYPE`; raises `UserError` for anything that is not there."""
  match = match_pair(text)
  pair = Pair(match["label"], match["other"], tuple(match["types"].split("/")) if match["types"] else ())
  run = [cell.label for cell in cells if cell.schedule is not None]
  for label in pair[:2]:
    if label not in run:
      raise UserError(f"--pairs: no cell {label!r}; there are: {', '.join(run)}")
  known = sorted({question.type for question in questions})
  for type in pair.types:
    if type not in known:
      raise UserError(f"--pairs: no questions of type {type!r}; there are: {', '.join(known)}")
  return pair


def controls(cells: Sequence[Cell]) -> dict[str, str]:
  """The control at the budget of every cell that can run, itself for a control, by their labels.

  Of random tokens those with RESTORE are the control of a cell with RESTORE, and those that keep their positions the
  control of one whose tokens keep them, as all do inside the decoder; plain ones where these are missing.
  """
  run = [cell for cell in cells if cell.schedule is not None and cell.budget is not None]
  label_of = {(cell.budget, cell.method): cell.label for cell in run if cell.method in CONTROLS}
  found = {}
  for cell in run:
    fair = ((cell.budget, f"{CONTROL}{option}") for option in _options(cell))
    control = next((label_of[own] for own in fair if own in label_of), None)
    if control is not None:
      found[cell.label] = cell.label if cell.method in CONTROLS else control
  return found


def _options(cell: Cell) -> tuple[str, ...]:
  """Options of a fair control, the fairest first."""
  if cell.schedule.restore:
    return RESTORE, POSITIONS, ""
  if cell.schedule.keep_positions or all(stage.layer > 0 for stage in cell.schedule.stages):
    return POSITIONS, ""
  return ("",)


def size_class(question: Question) -> str:
  """The class of the size of what a question asks for; empty if it is not known."""
  if question.size is None:
    return ""
  return next(name for name, bound in SIZE_CLASSES.items() if question.size <= bound)


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Questions, cells and answers of a comparison, with no pruning first.

  Attributes:
    answers: label of a cell that has run → question id → output row.
    timings: label → result of `measure.measure_times`, or empty.
    repeats: label → answers with further seeds, of cells that use chance; accuracies are means over all seeds, all other
      figures those of the first.
  """

  questions: Sequence[Question]
  cells: Sequence[Cell]
  answers: Mapping[str, Mapping[str, Mapping[str, Any]]]
  timings: Mapping[str, Mapping[str, Any]]
  sizes: PromptSizes
  repeats: Mapping[str, Sequence[Mapping[str, Mapping[str, Any]]]] = dataclasses.field(default_factory=dict)

  @property
  def has_errors(self) -> bool:
    """Whether a question has no answer without pruning."""
    return any(row["error"] is not None for row in self.answers[REFERENCE].values())

  def rows(self, *, seed: int) -> list[Row]:
    """Every figure of every cell, and a row for question-only answers; `seed` is the bootstrap's."""
    accuracies, plain = self._accuracies(seed), self.sizes.costs(Schedule())
    rows = []
    for cell in self.cells:
      row = {"method": cell.method, "label": cell.label, "budget": cell.budget, "note": cell.note}
      if cell.schedule is not None:
        own, timing, stages = self._costs(cell), self.timings[cell.label], cell.schedule.stages
        frozen = cell.schedule.frozen_layers
        row |= {
          "prune_layers": "/".join(map(str, frozen or [stage.layer for stage in stages])) or None,
          "keep": "/".join(str(stage.keep) for stage in stages) or None,
          "tokens_in": own.mean_tokens_in,
          "tokens_out": own.mean_tokens_out,
          "tokens_updated": own.mean_tokens_in * (1 - len(frozen) / self.sizes.model.num_layers),
          **accuracies[cell.label],
          "image_token_flops": own.image_tokens / plain.image_tokens,
          "all_token_flops": (own.decoder + own.scoring) / plain.decoder,
          "scoring_share": own.scoring / own.prefill,
          "cache": own.cache_bytes / plain.cache_bytes,
          "cache_bytes": own.cache_bytes,
          **{f"{phase}_time": timing.get(f"{phase}_ratio") for phase in ("prefill", "decode")},
          **{name: timing.get(name) for name in ("prefill_seconds", "decode_seconds", "compile_seconds")},
        }
      rows.append(row)
    rows.insert(1, {"method": QUESTION_ONLY, "label": QUESTION_ONLY} | accuracies[QUESTION_ONLY])
    return rows

  def _accuracies(self, seed: int) -> dict[str, Row]:
    """Accuracy by label, and its differences to no pruning and to the control at the same budget."""
    given = {label: self._given(own) for label, own in self.answers.items()}
    given[QUESTION_ONLY] = [question.guess for question in self.questions]
    control_of = controls(self.cells)
    right, places = self._right(given), {label: i for i, label in enumerate(given)}
    same = np.array([[is_right(a, b) for a, b in zip(own, given[REFERENCE], strict=True)] for own in given.values()])
    pictures = [question.image for question in self.questions]
    resampled, agreed = (resample(values, groups=pictures, seed=seed) for values in (right, same))
    mean = right.mean(axis=1)
    by_type = accuracy_by_type(right, [question.type for question in self.questions])
    by_size = accuracy_by_type(right, [size_class(question) for question in self.questions])
    figures = {}
    for label, index in places.items():
      row = {"questions": len(given[label]), "errors": sum(answer is None for answer in given[label])}
      row |= with_interval("accuracy", mean[index], resampled[:, index])
      for name, reference in (("difference", REFERENCE), ("beyond_random", control_of.get(label))):
        if reference is not None:
          other = places[reference]
          row |= with_interval(name, mean[index] - mean[other], resampled[:, index] - resampled[:, other])
      row["control"] = control_of.get(label)
      row |= {f"{BY_TYPE}{type}": float(values[index]) for type, values in by_type.items()}
      row |= {f"{BY_SIZE}{size}": float(by_size[size][index]) for size in SIZE_CLASSES if size in by_size}
      figures[label] = row | with_interval("agreement", same[index].mean(), agreed[:, index])
    held = [label for label, control in control_of.items() if control != label]
    if held:
      differences = np.stack([right[places[label]] - right[places[control_of[label]]] for label in held])
      by_picture = group_sums(differences, pictures)
      corrected = holm(paired_p_values(by_picture, seed=seed))
      mean_squares = np.square(by_picture).sum(axis=1) / len(pictures)
      for label, p_value, mean_square in zip(held, corrected.tolist(), mean_squares.tolist(), strict=True):
        figures[label] |= {"beyond_random_p": p_value, "mean_square": mean_square}
    return figures

  def pairs(self, pairs: Sequence[Pair], *, seed: int) -> list[Row]:
    """The differences of pairs of cells; p-values of sign-flip tests over pictures are corrected for all pairs (Holm)."""
    given = {label: self._given(self.answers[label]) for pair in pairs for label in pair[:2]}
    right = dict(zip(given, self._right(given), strict=True))
    rows, by_picture, pictures = [], [], [question.image for question in self.questions]
    for pair in pairs:
      is_asked = np.array([not pair.types or question.type in pair.types for question in self.questions])
      values = np.stack([right[pair.label], right[pair.other]])
      groups = [picture for picture, asked in zip(pictures, is_asked, strict=True) if asked]
      resampled = resample(values[:, is_asked], groups=groups, seed=seed)
      own, other = values[:, is_asked].mean(axis=1)
      row = {"cell": pair.label, "other": pair.other, "types": "/".join(pair.types), "questions": int(is_asked.sum())}
      row |= {"accuracy": own, "its_accuracy": other}
      rows.append(row | with_interval("difference", own - other, resampled[:, 0] - resampled[:, 1]))
      by_picture.append(group_sums((values[:1] - values[1:]) * is_asked, pictures)[0])
    corrected = holm(paired_p_values(np.stack(by_picture), seed=seed)) if rows else ()
    return [row | {"p": float(p)} for row, p in zip(rows, corrected, strict=True)]

  def _given(self, rows: Mapping[str, Mapping[str, Any]]) -> list[str | None]:
    return [rows[question.id]["answer"] for question in self.questions]

  def _right(self, given: Mapping[str, Sequence[str | None]]) -> Float[np.ndarray, "C Q"]:
    """Scores of all questions; means over the seeds of a cell that uses chance."""
    truths = [question.answer for question in self.questions]

    def scores(answers: Sequence[str | None]) -> list[float]:
      return [score(a, b) for a, b in zip(answers, truths, strict=True)]

    runs = {label: [own, *map(self._given, self.repeats.get(label, ()))] for label, own in given.items()}
    return np.array([np.mean([scores(own) for own in every], axis=0) for every in runs.values()])

  def _costs(self, cell: Cell) -> Costs:
    """Costs of a prompt with a cell's schedule, averaged over rows if they keep different counts."""
    rows = self.answers[cell.label].values()
    counts = collections.Counter(tuple(row["counts"]["kept"]) for row in rows if row.get("counts") is not None)
    each = [self.sizes.costs(cell.schedule.with_counts(kept)) for kept in counts] or [self.sizes.costs(cell.schedule)]
    if len(each) == 1:
      return each[0]
    weights = list(counts.values())
    *operations, tokens_in, tokens_out = np.average([dataclasses.astuple(own) for own in each], axis=0, weights=weights)
    return Costs(*map(round, operations), float(tokens_in), float(tokens_out))
