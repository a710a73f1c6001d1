"""Tries the proposals, and compares the best on questions that it has not seen."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from experiments import statistics, tabular
from experiments.calibrate import measure
from experiments.calibrate.propose import Measured, Proposal, assess, candidates, finished, matter_later, propose
from experiments.flow.answers import answers
from experiments.flow.subject import Subject
from experiments.question_sets import Question
from himap_jax import flops
from himap_jax.methods import build_schedule
from himap_jax.schedule import Schedule

PAPER = ((2, 8), (0.5, 0.125))
GRID_FIRST, GRID_SECOND = (1, 2, 3, 5), (0.25, 0.4, 0.55, 0.7)  # layers; the second ones in shares of the depth
GRID_KEEPS = 2  # first keep counts for each pair of layers
FOLDS = 10
FINISHED = 0.1  # of a flow, that may be left when it is said to have finished

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Tried:
  """A schedule that was run.

  Attributes:
    name: what it is.
    price: FLOPs on image tokens in units of no pruning.
    agreement: the share of answers that are those without pruning, with its 95% interval.
    same: `[Q]` whether each answer is.
    proposal: its layers and keep counts, and what was expected of them.
  """

  name: str
  price: float
  agreement: tuple[float, float, float]
  same: Float[np.ndarray, "Q"]
  proposal: Proposal


def split(questions: Sequence[Question], num_heldout: int, *, seed: int) -> tuple[list[Question], list[Question]]:
  """The questions to calibrate on, and those to compare on."""
  order = np.random.default_rng(seed).permutation(len(questions))
  heldout = set(order[:num_heldout].tolist())
  return (
    [question for index, question in enumerate(questions) if index not in heldout],
    [question for index, question in enumerate(questions) if index in heldout],
  )


def price_of(studied: Subject) -> Callable[[tuple[int, int], tuple[int, int]], float]:
  """FLOPs on image tokens (HiMAP, Eq. 10) of layers and keep counts, in units of no pruning."""
  text, count = studied.loaded.config.text, studied.processor.num_image_tokens
  plain = flops.image_token_flops(text, Schedule(), count)
  return lambda layers, keep: flops.image_token_flops(text, schedule_of(studied, layers, keep), count) / plain


def schedule_of(studied: Subject, layers: tuple[int, int], keep: tuple[int | float, ...]) -> Schedule:
  """HiMAP with these layers and keep counts."""
  return build_schedule(
    "himap",
    num_layers=studied.num_layers,
    num_image_tokens=studied.processor.num_image_tokens,
    prune_layers=layers,
    keep=keep,
  )


def try_proposals(
  studied: Subject, measured: Measured, budget: float, workdir: pathlib.Path, *, count: int, max_new_tokens: int
) -> list[Tried]:
  """Runs the schedules that lose least on the calibration questions."""
  proposals = propose(measured, price_of(studied), budget, count=count)
  return _run(
    studied,
    [(f"proposal {number}", proposal) for number, proposal in enumerate(proposals, start=1)],
    workdir,
    "calibration",
    max_new_tokens=max_new_tokens,
  )


def best(tried: Sequence[Tried]) -> Tried:
  """The one that agrees most; of equal ones the one that was proposed first."""
  return max(tried, key=lambda one: one.agreement[0])


def expected_agreement(tried: Sequence[Tried], *, seed: int) -> tuple[float, float, float]:
  """The agreement to expect of the best on other questions, with its 95% interval.

  The best of several is better on the questions that chose it than on others. So the choice is made anew without each of
  `FOLDS` parts of the questions, and what is chosen counts on that part alone (cross-validation).
  """
  same = np.stack([one.same for one in tried])  # [schedules, Q]
  fold = np.random.default_rng(seed).permutation(same.shape[1]) % FOLDS
  outside = np.empty(same.shape[1])
  for number in np.unique(fold):
    rest = same[:, fold != number]
    winner = np.argmax(rest.sum(axis=1)) if rest.size else 0
    outside[fold == number] = same[winner, fold == number]
  return _with_interval(outside, seed=seed)


def compare(
  studied: Subject, chosen: Tried, measured: Measured, budget: float, workdir: pathlib.Path, *, max_new_tokens: int
) -> list[Tried]:
  """Runs the chosen schedule, the paper's and a grid at the budget on other questions."""
  count, price = studied.processor.num_image_tokens, price_of(studied)
  layers, keep = PAPER[0], tuple(stage.keep for stage in schedule_of(studied, *PAPER).stages)
  entries = [("calibrated", chosen.proposal.prune_layers, chosen.proposal.keep), ("the paper's", layers, keep)]
  second = [round(share * studied.num_layers) for share in GRID_SECOND]
  by_layers: dict[tuple[int, int], list[tuple[int, int]]] = {}
  for layers, keep in candidates(studied.num_layers, count, price, budget):
    if layers[0] in GRID_FIRST and layers[1] in second:
      by_layers.setdefault(layers, []).append(keep)
  for layers, keeps in by_layers.items():
    places = np.unique(np.linspace(0, len(keeps) - 1, GRID_KEEPS).round().astype(int))
    entries += [("grid", layers, keeps[place]) for place in places]
  later = matter_later(measured)
  assessed = [(name, assess(measured, later, layers, keep)) for name, layers, keep in entries]
  return _run(studied, assessed, workdir, "heldout", max_new_tokens=max_new_tokens)


def _run(
  studied: Subject,
  entries: Sequence[tuple[str, Proposal]],
  workdir: pathlib.Path,
  part: str,
  *,
  max_new_tokens: int,
) -> list[Tried]:
  """Answers all questions with each schedule and counts how many answers stay."""
  plain = answers(studied, Schedule(), workdir / f"{part}-none.json", max_new_tokens=max_new_tokens)
  price, tried = price_of(studied), []
  for name, proposal in entries:
    layers, keep = proposal.prune_layers, proposal.keep
    path = workdir / f"{part}-{'_'.join(map(str, (*layers, *keep)))}.json"
    given = answers(studied, schedule_of(studied, layers, keep), path, max_new_tokens=max_new_tokens)
    same = measure.agreement(given, plain)
    agreement = _with_interval(same, seed=studied.seed)
    tried.append(Tried(name, price(layers, keep), agreement, same, proposal))
  return tried


def _with_interval(same: Float[np.ndarray, "Q"], *, seed: int) -> tuple[float, float, float]:
  low, high = statistics.interval(statistics.resample(same[None], seed=seed)[:, 0])
  return float(same.mean()), float(low), float(high)


def describe(
  chosen: Tried, expected: tuple[float, float, float], studied: Subject, measured: Measured
) -> dict[str, Any]:
  """The content of a schedule file: what `himap_jax.run --schedule` reads, and where it comes from."""
  return {
    "method": "himap",
    "prune_layers": list(chosen.proposal.prune_layers),
    "keep": list(chosen.proposal.keep),
    "image_token_flops": chosen.price,
    "expected_agreement": {"share": expected[0], "interval": list(expected[1:])},
    "lost": chosen.proposal.lost,
    "scores_covered": list(chosen.proposal.covered),
    "image_to_instruction_flows_before_layer": finished(measured.to_instruction.sum(axis=2).mean(axis=1), FINISHED),
    "image_to_image_matters_before_layer": finished(measured.image_weight, FINISHED),
    "num_questions": len(measured.to_image[0]),
    "checkpoint": studied.settings["checkpoint"],
  }


def write(
  output: pathlib.Path,
  tried: Sequence[Tried],
  expected: tuple[float, float, float],
  compared: Sequence[Tried],
  heading: str,
  *,
  seed: int,
) -> None:
  """Writes `calibrate.csv` and `calibrate.md`; of what was compared, the first is what the others are compared with."""
  rows = [{"questions": "calibration"} | _row(one) for one in tried]
  rows += [{"questions": "held out"} | _row(one, compared[0], seed=seed) for one in compared]
  tabular.write_csv(output / "calibrate.csv", rows)
  share, low, high = expected
  lines = [heading, "", "## Tried on the calibration questions", "", *_markdown(tried), ""]
  lines += [f"To expect of the best on other questions, by cross-validation: {share:.1%} ({low:.1%} to {high:.1%})."]
  if compared:
    order = sorted(compared, key=lambda one: one.name == "grid" and 1 - one.agreement[0])
    lines += ["", "## Compared on held-out questions", "", *_markdown(order, compared[0], seed=seed)]
  (output / "calibrate.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _row(one: Tried, reference: Tried | None = None, *, seed: int = 0) -> Row:
  agreement, low, high = one.agreement
  layers, keep = ("/".join(map(str, values)) for values in (one.proposal.prune_layers, one.proposal.keep))
  row: Row = {"schedule": one.name, "layers": layers, "keep": keep}
  row |= {"image_token_flops": one.price, "agreement": agreement, "agreement_low": low, "agreement_high": high}
  if reference is not None:
    difference, low, high = _with_interval(one.same - reference.same, seed=seed)
    row |= {"difference": difference, "difference_low": low, "difference_high": high}
  return row | {"lost": one.proposal.lost, "covered": "/".join(f"{share:.3f}" for share in one.proposal.covered)}


def _markdown(tried: Sequence[Tried], reference: Tried | None = None, *, seed: int = 0) -> list[str]:
  cells = []
  for one in tried:
    row = _row(one, reference, seed=seed)
    cell = [row["schedule"], row["layers"], row["keep"], f"{one.price:.1%}"]
    cell.append(tabular.with_interval(row, "agreement", ".1%"))
    if reference is not None:
      cell.append(tabular.with_interval(row, "difference", "+.1%"))
    cells.append([*cell, f"{one.proposal.lost:.1%}", row["covered"]])
  header = ["", "layers", "keeps", "FLOPs on image tokens", "answers as without pruning"]
  header += [f"difference to {reference.name}"] if reference is not None else []
  return tabular.markdown([*header, "flow lost", "scores kept"], cells)
