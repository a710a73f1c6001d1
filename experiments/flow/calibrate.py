"""Which layers and keep counts suit a checkpoint? A schedule of HiMAP from measurements on the model itself.

    python -m experiments.flow.calibrate --flagfile=experiments/flags/calibrate.flags

On some hundred questions, whose answers need not be known, it measures where visual information flows (saliency), how
much the answers depend on it (disruption) and what HiMAP would keep (scores). Of all layers and keep counts within
the budget it takes those whose dropped tokens carry least of the flow, runs the best of them, and writes
`schedule.json` for `himap_jax.run --schedule` with the expected agreement with no pruning. `--num_heldout` compares
the result on held-out questions with the paper's setting and with a grid. The same command resumes an interrupted
run.

Axes: L layers, Q questions, N image tokens.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags
from jaxtyping import Float

from experiments.flow import disruption, saliency
from experiments.flow.decoder import himap_scores
from experiments.flow.interventions import BLOCKS, Intervention
from experiments.flow.proposals import Measured, Proposal, Two, assess, candidates, finished, later_weights, propose
from experiments.question_sets import Question, is_right
from experiments.shared import statistics, study, tabular
from experiments.shared.study import Report
from experiments.shared.subject import Batch, Subject
from experiments.shared.tabular import Row
from himap_jax.engine.accounting import model_sizes
from himap_jax.errors import UserError
from himap_jax.pruning.cost import image_token_flops
from himap_jax.pruning.schedule import Schedule

PAPER = ((2, 8), (0.5, 0.125))
GRID_FIRST, GRID_SECOND = (1, 2, 3, 5), (0.25, 0.4, 0.55, 0.7)  # layers; the second ones in shares of the depth
GRID_KEEPS = 2  # first keep counts for each pair of layers
FOLDS = 10
FINISHED = 0.1  # share of a flow that may be left in the layers after it has finished


@dataclasses.dataclass(frozen=True)
class Trial:
  """A schedule and its answers.

  Attributes:
    name: of the schedule.
    price: FLOPs on image tokens (HiMAP, Eq. 10), relative to no pruning.
    same: `[Q]` whether each answer is the one without pruning.
    proposal: layers, keep counts, and their loss.
  """

  name: str
  price: float
  same: Float[np.ndarray, "Q"]
  proposal: Proposal

  @property
  def agreement(self) -> float:
    """The share of answers that are those without pruning."""
    return float(self.same.mean())


@dataclasses.dataclass(frozen=True)
class Trials:
  """Runs schedules on some questions.

  Attributes:
    subject: model and questions.
    workdir: directory of a file of answers for every schedule.
    part: prefix of these files.
    max_new_tokens: of an answer.
  """

  subject: Subject
  workdir: pathlib.Path
  part: str
  max_new_tokens: int

  def price(self, layers: Two, keep: Two) -> float:
    """FLOPs on image tokens (HiMAP, Eq. 10), relative to no pruning."""
    sizes, count = model_sizes(self.subject.loaded.config), self.subject.batcher.num_image_tokens
    pruned, plain = (image_token_flops(sizes, s, count) for s in (self.subject.himap(layers, keep), Schedule()))
    return pruned / plain

  def run(self, entries: Sequence[tuple[str, Proposal]]) -> list[Trial]:
    """The trials of named proposals."""

    def answers(schedule: Schedule, name: str) -> dict[str, str]:
      path = self.workdir / f"{self.part}-{name}.json"
      return self.subject.answers(schedule, path, max_new_tokens=self.max_new_tokens)

    plain, trials = answers(Schedule(), "none"), []
    for name, proposal in entries:
      layers, keep = proposal.prune_layers, proposal.keep
      given = answers(self.subject.himap(layers, keep), "_".join(map(str, (*layers, *keep))))
      same = np.array([is_right(given[row_id], answer) for row_id, answer in plain.items()], np.float64)
      trials.append(Trial(name, self.price(layers, keep), same, proposal))
    return trials


def split(questions: Sequence[Question], num_heldout: int, *, seed: int) -> tuple[list[Question], list[Question]]:
  """Splits questions at random into those for calibration and the held-out ones."""
  heldout = set(np.random.default_rng(seed).permutation(len(questions))[:num_heldout].tolist())
  parts: tuple[list[Question], list[Question]] = ([], [])
  for index, question in enumerate(questions):
    parts[index in heldout].append(question)
  return parts


def best(tried: Sequence[Trial]) -> Trial:
  """The one with the highest agreement; of equal ones that with the smallest loss."""
  return max(tried, key=lambda trial: trial.agreement)


def expected_agreement(tried: Sequence[Trial], *, seed: int) -> Row:
  """The agreement to expect of the best on other questions, with its 95% interval, by cross-validation.

  The best of several is better on the questions that chose it than on others. So the choice is repeated without each of
  `FOLDS` parts of the questions, and its result is evaluated on that part alone.
  """
  same = np.stack([trial.same for trial in tried])  # [schedules, Q]
  fold = np.random.default_rng(seed).permutation(same.shape[1]) % FOLDS
  outside = np.empty(same.shape[1])
  for number in np.unique(fold):
    rest = same[:, fold != number]
    winner = np.argmax(rest.sum(axis=1)) if rest.size else 0
    outside[fold == number] = same[winner, fold == number]
  return statistics.mean_with_interval("agreement", outside, seed=seed)


def compare(trials: Trials, chosen: Trial, measured: Measured, budget: float) -> list[Trial]:
  """Runs the chosen schedule, the paper's and a grid at the budget on held-out questions."""
  num_layers, count = trials.subject.num_layers, trials.subject.batcher.num_image_tokens
  layers, keep = PAPER[0], tuple(stage.keep for stage in trials.subject.himap(*PAPER).stages)
  entries = [("calibrated", chosen.proposal.prune_layers, chosen.proposal.keep), ("the paper's", layers, keep)]
  second = [round(share * num_layers) for share in GRID_SECOND]
  by_layers: dict[Two, list[Two]] = {}
  for layers, keep in candidates(num_layers, count, trials.price, budget):
    if layers[0] in GRID_FIRST and layers[1] in second:
      by_layers.setdefault(layers, []).append(keep)
  for layers, keeps in by_layers.items():
    places = np.unique(np.linspace(0, len(keeps) - 1, GRID_KEEPS).round().astype(int))
    entries += [("grid", layers, keeps[place]) for place in places]
  later = later_weights(measured)
  return trials.run([(name, assess(measured, later, layers, keep)) for name, layers, keep in entries])


def describe(chosen: Trial, expected: Row, measured: Measured, checkpoint: str) -> dict[str, Any]:
  """The content of a schedule file for `himap_jax.run --schedule`, with its origin."""
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


def rows_of(trials: Sequence[Trial], questions: str, *, seed: int, reference: Trial | None = None) -> list[Row]:
  """A row for every trial, with its difference to a reference on the same questions where there is one."""
  result = []
  for trial in trials:
    proposal = trial.proposal
    layers, keep = ("/".join(map(str, values)) for values in (proposal.prune_layers, proposal.keep))
    row = {"questions": questions, "schedule": trial.name, "layers": layers, "keep": keep}
    row |= {"image_token_flops": trial.price}
    row |= statistics.mean_with_interval("agreement", trial.same, seed=seed)
    if reference is not None:
      row |= statistics.mean_with_interval("difference", trial.same - reference.same, seed=seed)
    covered = "/".join(f"{share:.3f}" for share in proposal.covered)
    result.append(row | {"lost": proposal.lost, "covered": covered})
  return result


def summary(tried: Sequence[Row], expected: Row, compared: Sequence[Row]) -> list[str]:
  """The rows in Markdown; the first of the compared ones is the reference of the others."""
  agreement = tabular.with_interval("agreement", ".1%")
  left = {"": "{schedule}", "layers": "{layers}", "keeps": "{keep}", "FLOPs on image tokens": "{image_token_flops:.1%}"}
  left["answers as without pruning"] = agreement
  right = {"flow lost": "{lost:.1%}", "scores kept": "{covered}"}
  lines = ["## Tried on the calibration questions", "", *tabular.formatted(tried, left | right), ""]
  share = agreement.format_map(expected)
  lines += [f"Expected agreement of the best on other questions, by cross-validation: {share}."]
  if compared:
    order = sorted(compared, key=lambda row: row["schedule"] == "grid" and 1 - row["agreement"])
    difference = {f"difference to {order[0]['schedule']}": tabular.with_interval("difference", "+.1%")}
    lines += ["", "## Compared on held-out questions", "", *tabular.formatted(order, left | difference | right)]
  return lines


def measure(
  subject: Subject, workdir: pathlib.Path, *, layers_at_a_time: int, disrupted_layers: Sequence[int]
) -> Measured:
  """Measures on the questions of a subject, which need no answers; resumes from the work directory.

  Flows are taken out of `disrupted_layers`; the weights of layers between them are interpolated. See `saliency.measure`
  for `layers_at_a_time`.
  """
  for name in ("saliency", "disruption"):
    (workdir / name).mkdir(exist_ok=True)
  _, flow = saliency.measure(subject, workdir / "saliency", layers_at_a_time=layers_at_a_time)
  made = [Intervention(block, "block", "mask") for block in BLOCKS]
  disruptions = [disruption.Disruption(one, "single", layer) for one in made for layer in disrupted_layers]
  _, outcome = disruption.measure(subject, disruptions, workdir / "disruption")
  changed = 1 - outcome.overlap.mean(axis=1).reshape(len(BLOCKS), -1)
  weights = [np.interp(np.arange(subject.num_layers), disrupted_layers, values) for values in changed]

  def compute(batch: Batch) -> dict[str, np.ndarray]:
    both = himap_scores(subject.loaded.model, batch.inputs, num_layers=subject.num_layers)
    return dict(zip(("instruction", "image"), map(np.asarray, both), strict=True))

  _, received = subject.measure(workdir / "scores", compute, axis=1)
  return Measured(flow.to_instruction, flow.to_image, *weights, **{f"{name}_scores": x for name, x in received.items()})


def define_flags() -> None:
  """Defines the study's own flags."""
  flags.DEFINE_string("budget", "24%", "FLOPs on image tokens (HiMAP, Eq. 10), relative to no pruning.")
  heldout = "Held-out questions for the comparison, of --num_questions."
  flags.DEFINE_integer("num_heldout", 0, heldout, lower_bound=0)
  flags.DEFINE_integer("num_tried", 5, "Schedules that are run on the calibration questions.", lower_bound=1)
  flags.DEFINE_integer("layers_at_a_time", 10, "As in experiments.flow.saliency.", lower_bound=1)
  flags.DEFINE_list("disrupted_layers", None, "As --layers of experiments.flow.disruption; every layer by default.")
  flags.DEFINE_integer("max_new_tokens", 8, "The longest answer, in tokens.", lower_bound=1)


def run(values: Any) -> Report:
  """Measures what is missing and makes the schedule and the tables."""
  budget = _share(values["budget"])
  subject = study.load_subject()
  seed, num_heldout, count = subject.seed, values.num_heldout, len(subject.questions)
  if num_heldout >= count:
    raise UserError(f"--num_heldout={num_heldout} leaves none of {count} questions to calibrate on")
  layers = study.layers(values["disrupted_layers"], subject) or tuple(range(subject.num_layers))
  if list(layers) != sorted(set(layers)):
    raise UserError("--disrupted_layers must ascend")
  settings = {name: values[name].value for name in ("num_heldout", "max_new_tokens", "disrupted_layers")}
  workdir = study.open_workdir(subject, **settings)
  parts = zip(("calibration", "heldout"), split(subject.questions, num_heldout, seed=seed), strict=True)
  calibration, heldout = (
    Trials(dataclasses.replace(subject, questions=questions), workdir, part, values.max_new_tokens)
    for part, questions in parts
  )
  at_once = values.layers_at_a_time
  measured = measure(calibration.subject, workdir, layers_at_a_time=at_once, disrupted_layers=layers)
  proposals = propose(measured, calibration.price, budget, count=values.num_tried)
  tried = calibration.run([(f"proposal {number}", proposal) for number, proposal in enumerate(proposals, start=1)])
  chosen, expected = best(tried), expected_agreement(tried, seed=seed)
  rows, compared = rows_of(tried, "calibration", seed=seed), []
  if num_heldout:
    trials = compare(heldout, chosen, measured, budget)
    compared = rows_of(trials, "held out", seed=seed, reference=trials[0])
  return Report(
    count=f"{len(chosen.same)} questions",
    summary=summary(rows, expected, compared),
    tables={"calibrate": [*rows, *compared]},
    documents={"schedule": describe(chosen, expected, measured, subject.settings["checkpoint"])},
  )


def _share(flag: Any) -> float:
  number = flag.value.removesuffix("%")
  try:
    share = float(number) / 100
  except ValueError:
    share = 0.0
  if number == flag.value or not 0 < share <= 1:
    raise UserError(f"--{flag.name}={flag.value}: not a share such as 24%")
  return share


if __name__ == "__main__":
  study.start("experiments.flow.calibrate", define_flags, run)
