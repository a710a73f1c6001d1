"""Finds a HiMAP schedule for a checkpoint from measurements on the model itself.

    python -m experiments.flow.calibrate --flagfile=experiments/flags/calibrate.flags

On about a hundred questions, whose answers need not be known, it measures where visual information flows (saliency),
how much the answers depend on it (disruption) and what HiMAP would keep (scores). Among the layers and keep counts
within the budget, it selects those whose dropped tokens carry the least flow, runs the best of them, and writes
`schedule.json` for `himap_jax.run --schedule` with the expected agreement with no pruning. `--num_heldout` compares the
result on held-out questions with the paper's setting and with a grid.

Axes: L layers, Q questions, N image tokens.
"""

import collections
import contextlib
import dataclasses
import itertools
import pathlib
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from jaxtyping import Float

from experiments import question_sets
from experiments.flow import disruption, saliency
from experiments.flow.decoder import himap_scores
from experiments.flow.interventions import BLOCKS, Intervention
from experiments.flow.proposals import Measured, Proposal, Two, assess, candidates, check_budget, finished, propose
from experiments.question_sets import Question, is_right
from experiments.shared import statistics, study, tabular
from experiments.shared.subject import Batch, Subject
from himap_jax.engine.accounting import model_sizes
from himap_jax.errors import UserError
from himap_jax.pruning.cost import costs
from himap_jax.pruning.schedule import Schedule
from himap_jax.run import flag_values

PAPER = ((2, 8), (0.5, 0.125))
GRID_FIRST, GRID_SECOND = (1, 2, 3, 5), (0.25, 0.4, 0.55, 0.7)  # layers; the second as shares of the depth
FOLDS, REPEATS = 10, 50
FINISHED = 0.1  # a flow has finished where at most this share of it is left


class Trial(NamedTuple):
  """A schedule and its answers."""

  name: str
  price: float  # FLOPs on image tokens (HiMAP, Eq. 10), relative to no pruning
  same: Float[np.ndarray, "Q"]  # whether each answer is the one without pruning
  pictures: Sequence[Hashable]  # of these questions
  proposal: Proposal

  @property
  def agreement(self) -> float:
    return float(self.same.mean())


class Trials(NamedTuple):
  """Runs schedules on some questions and caches the answers."""

  subject: Subject
  prefix: pathlib.Path  # path prefix of the answer files
  max_new_tokens: int

  def price(self, layers: Two, keep: Two) -> float:
    """FLOPs on image tokens (HiMAP, Eq. 10), relative to no pruning."""
    subject, schedules = self.subject, (self.subject.himap(layers, keep), Schedule())
    sizes, count = model_sizes(subject.loaded.config, subject.processor.image_shape), subject.processor.num_image_tokens
    pruned, plain = (costs(sizes, schedule, count, 0).image_tokens for schedule in schedules)
    return pruned / plain

  def run(self, entries: Sequence[tuple[str, Proposal]]) -> list[Trial]:
    schedules = {"none": Schedule()}
    schedules |= {proposal.key: self.subject.himap(proposal.prune_layers, proposal.keep) for _, proposal in entries}
    answers = self.subject.answers(schedules, self.prefix, max_new_tokens=self.max_new_tokens)
    picture_of = {question.id: question.image for question in self.subject.questions}
    trials, pictures = [], [picture_of[row_id] for row_id in answers["none"]]
    for name, proposal in entries:
      same = [is_right(answers[proposal.key][row_id], answer) for row_id, answer in answers["none"].items()]
      price = self.price(proposal.prune_layers, proposal.keep)
      trials.append(Trial(name, price, np.array(same, np.float64), pictures, proposal))
    return trials


def split(questions: Sequence[Question], num_heldout: int, *, seed: int) -> tuple[list[Question], list[Question]]:
  """Questions to calibrate on, and at least `num_heldout` others, about other pictures."""
  pictures = list(dict.fromkeys(question.image for question in questions))
  counts, heldout = collections.Counter(question.image for question in questions), set()
  order = (pictures[index] for index in np.random.default_rng(seed).permutation(len(pictures)))
  while sum(counts[picture] for picture in heldout) < num_heldout:
    heldout.add(next(order))
  return tuple([own for own in questions if (own.image in heldout) is wanted] for wanted in (False, True))


def best(tried: Sequence[Trial]) -> Trial:
  return max(tried, key=lambda trial: trial.agreement)  # of equal ones the first, which has the smallest loss


def expected_agreement(tried: Sequence[Trial], *, seed: int) -> tabular.Row:
  """Expected agreement of the best schedule on other questions, with its 95% interval, by cross-validation.

  The best of several schedules scores higher on the questions that selected it than on others. The selection is
  therefore repeated without each of `FOLDS` parts of the questions and evaluated on that part; questions about one
  picture are in one part. This is done for `REPEATS` random partitions, since the result of one varies much; the
  interval is over questions and partitions.
  """
  same = np.stack([trial.same for trial in tried])  # [schedules, Q]
  pictures, picture = np.unique(np.array(list(map(str, tried[0].pictures))), return_inverse=True)
  random, numbers, outside = np.random.default_rng(seed), np.arange(same.shape[1]), []
  for _ in range(REPEATS):
    fold = (random.permutation(len(pictures)) % FOLDS)[picture]
    winners = np.array([same[:, fold != number].sum(axis=1).argmax() for number in range(FOLDS)])
    outside.append(same[winners[fold], numbers])
  resampled = statistics.resample(np.stack(outside), groups=tried[0].pictures, seed=seed)
  return statistics.with_interval("agreement", np.mean(outside), resampled.ravel())


def compare(trials: Trials, chosen: Trial, measured: Measured, budget: float) -> list[Trial]:
  """Tries the chosen proposal, the paper's schedule and a grid of layers and counts within the budget."""
  num_layers, count = trials.subject.num_layers, trials.subject.processor.num_image_tokens
  paper = PAPER[0], tuple(stage.keep for stage in trials.subject.himap(*PAPER).stages)
  entries = [("calibrated", chosen.proposal), ("the paper's", assess(measured, *paper))]
  second = [round(share * num_layers) for share in GRID_SECOND]
  affordable = candidates(num_layers, count, trials.price, budget)
  for layers, choices in itertools.groupby(affordable, key=lambda choice: choice[0]):
    if layers[0] in GRID_FIRST and layers[1] in second:
      keeps = [keep for _, keep in choices]
      entries += [("grid", assess(measured, layers, keep)) for keep in dict.fromkeys((keeps[0], keeps[-1]))]
  return trials.run(entries)


def describe(chosen: Trial, expected: tabular.Row, measured: Measured, checkpoint: str) -> dict[str, Any]:
  """Content of a schedule file for `himap_jax.run --schedule`, with its provenance."""
  share, *interval = (expected[name] for name in statistics.names("agreement"))
  return {
    "method": "himap",
    "prune_layers": list(chosen.proposal.prune_layers),
    "keep": list(chosen.proposal.keep),
    "image_token_flops": chosen.price,
    "expected_agreement": {"share": share, "interval": interval},
    "lost": chosen.proposal.lost,
    "scores_covered": list(chosen.proposal.covered),
    "image_to_instruction_flows_before_layer": finished(measured.to_instruction.sum(axis=2).mean(axis=1), FINISHED),
    "image_to_image_matters_before_layer": finished(measured.image_weight, FINISHED),
    "num_questions": len(measured.to_image[0]),
    "checkpoint": checkpoint,
  }


def rows_of(trials: Sequence[Trial], questions: str, *, seed: int, reference: Trial | None = None) -> list[tabular.Row]:
  """A row per trial: shares of answers as without pruning, and differences to `reference`, with 95% intervals."""
  columns = {"agreement": np.stack([trial.same for trial in trials])}
  if reference is not None:
    columns["difference"] = columns["agreement"] - reference.same
  rows = []
  for trial, shares in zip(trials, statistics.mean_rows(columns, seed=seed), strict=True):
    layers, keep = ("/".join(map(str, values)) for values in (trial.proposal.prune_layers, trial.proposal.keep))
    row = {"questions": questions, "schedule": trial.name, "layers": layers, "keep": keep}
    row |= {"image_token_flops": trial.price, **shares, "lost": trial.proposal.lost}
    rows.append(row | {"covered": "/".join(f"{share:.3f}" for share in trial.proposal.covered)})
  return rows


def summary(tried: Sequence[tabular.Row], expected: tabular.Row, compared: Sequence[tabular.Row]) -> list[str]:
  agreement = tabular.with_interval("agreement", ".1%")
  left = {"": "{schedule}", "layers": "{layers}", "keeps": "{keep}", "FLOPs on image tokens": "{image_token_flops:.1%}"}
  left["answers as without pruning"] = agreement
  right = {"flow lost": "{lost:.1%}", "scores kept": "{covered}"}
  share = agreement.format_map(expected)
  lines = ["## Tried on the calibration questions", "", *tabular.formatted(tried, left | right), ""]
  lines += [f"Expected agreement of the best on other questions, by cross-validation: {share}."]
  if compared:
    order = sorted(compared, key=lambda row: row["schedule"] == "grid" and 1 - row["agreement"])
    difference = {f"difference to {order[0]['schedule']}": tabular.with_interval("difference", "+.1%")}
    lines += ["", "## Compared on held-out questions", "", *tabular.formatted(order, left | difference | right)]
  return lines


def measure(
  subject: Subject, workdir: pathlib.Path, *, layers_at_a_time: int, disrupted_layers: Sequence[int]
) -> Measured:
  """Measures on a subject's questions, which need no answers; resumes from the work directory.

  Flows are removed from `disrupted_layers`, in ascending order; the weights of layers between them are interpolated.
  See `saliency.measure` for `layers_at_a_time`.
  """
  _, flow = saliency.measure(subject, workdir, layers_at_a_time=layers_at_a_time)
  made = [Intervention(block, "block", "mask") for block in BLOCKS]
  disruptions = [disruption.Disruption(one, "single", layer) for one in made for layer in disrupted_layers]
  _, outcome = disruption.measure(subject, disruptions, workdir)
  changed = 1 - outcome["overlap"].mean(axis=1).reshape(len(BLOCKS), -1)
  weights = [np.interp(np.arange(subject.num_layers), disrupted_layers, values) for values in changed]

  def compute(batch: Batch) -> dict[str, np.ndarray]:
    both = himap_scores(subject.loaded.model, batch.inputs, num_layers=subject.num_layers)
    return dict(zip(("instruction_scores", "image_scores"), map(np.asarray, both), strict=True))

  _, scores = subject.measure(workdir / "scores", compute, axis=1)
  return Measured(flow.to_instruction, flow.to_image, *weights, **scores)


def define_flags() -> None:
  flags.DEFINE_string("budget", "24%", "FLOPs on image tokens (HiMAP, Eq. 10), relative to no pruning.")
  heldout = (
    "Number of questions of --num_questions held out for the comparison, or a few more: those of whole pictures."
  )
  flags.DEFINE_integer("num_heldout", 0, heldout, lower_bound=0)
  flags.DEFINE_integer("num_tried", 5, "Number of schedules to run on the calibration questions.", lower_bound=1)
  flags.DEFINE_integer("layers_at_a_time", 10, "As in experiments.flow.saliency.", lower_bound=1)
  flags.DEFINE_list("disrupted_layers", None, "As --layers of experiments.flow.disruption; every layer by default.")
  flags.DEFINE_integer("max_new_tokens", 8, "Maximum answer length, in tokens.", lower_bound=1)


def run(values: Any) -> study.Report:
  budget = _share(values["budget"])
  subject = study.load_subject()
  seed, num_heldout, count = subject.seed, values.num_heldout, len(subject.questions)
  if num_heldout >= count:
    raise UserError(f"--num_heldout={num_heldout} leaves none of {count} questions to calibrate on")
  layers = sorted(set(study.layers(values["disrupted_layers"], subject)))
  parts = split(subject.questions, num_heldout, seed=seed)
  if not parts[0]:
    raise UserError(f"--num_heldout={num_heldout} leaves no picture to calibrate on")
  flags_of = ("num_heldout", "max_new_tokens", "disrupted_layers")
  workdir = study.workdir_for(subject, *flags_of, calibration=question_sets.digest(parts[0]))
  calibration, heldout = (
    Trials(dataclasses.replace(subject, questions=own), workdir / name, values.max_new_tokens)
    for name, own in zip(("calibration", "heldout"), parts, strict=True)
  )
  check_budget(subject.num_layers, subject.processor.num_image_tokens, calibration.price, budget)
  at_once = values.layers_at_a_time
  measured = measure(calibration.subject, workdir, layers_at_a_time=at_once, disrupted_layers=layers)
  proposals = propose(measured, calibration.price, budget, count=values.num_tried)
  tried = calibration.run([(f"proposal {number}", proposal) for number, proposal in enumerate(proposals, start=1)])
  chosen, expected = best(tried), expected_agreement(tried, seed=seed)
  rows, compared = rows_of(tried, "calibration", seed=seed), []
  if num_heldout:
    trials = compare(heldout, chosen, measured, budget)
    compared = rows_of(trials, "held out", seed=seed, reference=trials[0])
  lines, tables = summary(rows, expected, compared), {"calibrate": [*rows, *compared]}
  documents = {"schedule": describe(chosen, expected, measured, values.checkpoint)}
  return study.Report(f"{len(chosen.same)} questions", lines, tables, documents=documents)


def _share(flag: Any) -> float:
  with contextlib.suppress(ValueError):
    share = flag_values.keep_count(flag.value)
    if isinstance(share, float) and 0 < share <= 1:
      return share
  raise UserError(f"--{flag.name}={flag.value}: not a share such as 24%")


if __name__ == "__main__":
  study.start("flow.calibrate", define_flags, run)
