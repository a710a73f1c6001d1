"""Do picture-dependent keep counts beat fixed ones at equal FLOPs?

    python -m experiments.flow.adaptive --flagfile=experiments/flags/adaptive.flags

Answers all questions with fixed HiMAP on every rung of a ladder of keep counts and measures the share of the
instruction's attention that each rung's tokens hold. `--method=himap_adaptive` picks, for each row, the cheapest rung
that holds the threshold's share, and then answers like fixed HiMAP on that rung. Accuracy, agreement and FLOPs of every
threshold follow from these runs.

Axes: R rungs, P rungs and no pruning, C rungs, no pruning and thresholds, Q questions, W resamples.
"""

import itertools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Bool, Float
from matplotlib.figure import Figure

from experiments.flow.decoder import himap_scores
from experiments.question_sets import score
from experiments.shared import figures, statistics, study, tabular
from experiments.shared.subject import Batch, Subject
from himap_jax.engine.accounting import model_sizes
from himap_jax.errors import UserError
from himap_jax.inputs import TEXT
from himap_jax.pruning import cost
from himap_jax.pruning.methods.himap_adaptive import cheapest_rung, held_share
from himap_jax.pruning.schedule import Schedule
from himap_jax.run import flag_values

MEASURES = ("accuracy", "agreement")


class Outcomes(NamedTuple):
  """Results of all rungs, cheapest first, and of no pruning."""

  price: Float[np.ndarray, "P Q"]  # FLOPs of the decoder's prefill on all tokens and of scoring, relative to no pruning
  right: Float[np.ndarray, "P Q"]  # score of the answer against the true one
  same: Float[np.ndarray, "P Q"]  # score of the answer against the one without pruning
  mass: Float[np.ndarray, "R Q"]  # share of the first stage's scores held by the kept tokens
  keep: list[str]  # keep counts of each rung's stages


def measure(subject: Subject, rungs: Sequence[Schedule], workdir: pathlib.Path, *, max_new_tokens: int) -> Outcomes:
  """Answers every question on every rung, and measures the scores that each rung's tokens hold."""

  def compute(batch: Batch) -> dict[str, np.ndarray]:
    by_instruction, _ = himap_scores(subject.loaded.model, batch.inputs, num_layers=rungs[0].stages[0].layer)
    length = (batch.inputs.layout.kind == TEXT).sum(axis=1)
    return {"held": np.asarray(held_share(by_instruction[-1])), "length": length}

  schedules = {"/".join(str(stage.keep) for stage in rung.stages): rung for rung in rungs} | {"none": Schedule()}
  answers = subject.answers(schedules, workdir / "answers", max_new_tokens=max_new_tokens)
  questions, measured = subject.measure(workdir / "held", compute, axis=0)

  def flops(schedule: Schedule, length: int) -> int:
    sizes = model_sizes(subject.loaded.config, subject.processor.image_shape)
    costs = cost.costs(sizes, schedule, subject.processor.num_image_tokens, length)
    return costs.decoder + costs.scoring

  plain = [flops(Schedule(), length) for length in measured["length"].tolist()]
  price = [[flops(own, n) for n in measured["length"].tolist()] for own in schedules.values()]
  return Outcomes(
    price=np.array(price) / plain,
    right=np.array([[score(own[q.id], q.answer) for q in questions] for own in answers.values()]),
    same=np.array([[score(own[q.id], answers["none"][q.id]) for q in questions] for own in answers.values()]),
    mass=np.stack([measured["held"][:, rung.stages[0].keep - 1] for rung in rungs]),
    keep=[*schedules][:-1],
  )


def rows(outcomes: Outcomes, thresholds: Sequence[float], *, seed: int) -> tuple[list[tabular.Row], list[tabular.Row]]:
  """One row for each rung and for no pruning, then one for each threshold.

  Threshold rows include their difference to fixed HiMAP at the same FLOPs, interpolated between the neighbouring rungs
  (or the last rung and no pruning): the result of assigning rungs to questions at random.
  """
  num_fixed, num_questions = outcomes.price.shape
  mass = jnp.asarray(outcomes.mass.T, jnp.float32)
  assigned = [np.asarray(cheapest_rung(mass, jnp.float32(threshold))) for threshold in thresholds]
  values = {
    name: np.concatenate([own, [own[rungs, np.arange(num_questions)] for rungs in assigned]])  # [C, Q]
    for name, own in zip(("price", *MEASURES), outcomes, strict=False)
  }
  table = [{"keep": name} for name in (*outcomes.keep, "no pruning")]
  for threshold, rungs in zip(thresholds, assigned, strict=True):
    counts = np.bincount(rungs, minlength=len(outcomes.keep))
    table.append({"threshold": threshold, "rungs": "/".join(map(str, counts))})
  shares = statistics.mean_rows({name: values[name] for name in MEASURES}, seed=seed)
  for row, price, own in zip(table, values["price"].mean(axis=1), shares, strict=True):
    row |= {"flops": float(price), **own}
  # [W, C]: the means, then their resamples, over the same questions for all cells
  means = {name: np.stack([own.mean(axis=1), *statistics.resample(own, seed=seed)]) for name, own in values.items()}
  for index, row in enumerate(table[num_fixed:], start=num_fixed):
    for name in MEASURES:
      pairs = zip(means["price"], means[name], strict=True)
      line = [np.interp(price[index], price[:num_fixed], fixed[:num_fixed]) for price, fixed in pairs]
      beyond = means[name][:, index] - line
      row |= statistics.with_interval(f"{name}_beyond_fixed", beyond[0], beyond[1:])
  for row, own, same in zip(table, outcomes.mass, outcomes.same, strict=False):  # rungs only
    row |= {"mass": float(own.mean()), "mass_spread": float(own.std()), "mass_tells": _auc(own, same == 1)}
  return table[:num_fixed], table[num_fixed:]


def _auc(mass: Float[np.ndarray, "Q"], stays: Bool[np.ndarray, "Q"]) -> float | None:
  """Area under the ROC curve: how often a question whose answer stays has more mass than one whose answer changes."""
  if stays.all() or not stays.any():
    return None
  return float((np.sign(mass[stays][:, None] - mass[~stays][None]).mean() + 1) / 2)


def cheapest(outcomes: Outcomes) -> float:
  """Mean price if an oracle chose for every question the cheapest rung with the answer of no pruning."""
  return float(np.take_along_axis(outcomes.price, (outcomes.same == 1).argmax(axis=0)[None], axis=0).mean())


def summary(fixed: Sequence[tabular.Row], adapted: Sequence[tabular.Row], cheapest: float) -> list[str]:
  common = {"FLOPs, all tokens": "{flops:.1%}"} | {name: tabular.with_interval(name, ".1%") for name in MEASURES}
  held = {"attention held": "{mass:.1%} ± {mass_spread:.1%}"}
  held["held more where the answer stays"] = "{mass_tells:.0%} of pairs"
  beyond = {f"{name} beyond fixed": tabular.with_interval(f"{name}_beyond_fixed", "+.1%") for name in MEASURES}
  by_threshold = {"threshold": "{threshold:g}", "questions by rung": "{rungs}"}
  return [
    *("## Fixed", "", *tabular.formatted(fixed, {"keeps": "{keep}"} | common | held), ""),
    *("## Adaptive", "", *tabular.formatted(adapted, by_threshold | common | beyond), ""),
    f"With every question on the cheapest rung that answers as no pruning does, FLOPs would be {cheapest:.1%}.",
  ]


def plot(fixed: Sequence[tabular.Row], adapted: Sequence[tabular.Row]) -> Figure:
  """Plots accuracy and agreement against FLOPs; of thresholds with equal FLOPs only the first is labelled."""
  figure = Figure(figsize=(11, 4.2), layout="constrained")
  for axes, measure in zip(figure.subplots(1, len(MEASURES)), MEASURES, strict=True):
    for name, colour, line, rows in (("fixed", "#555555", "o--", fixed), ("adaptive", "#d1221b", "s-", adapted)):
      names, style = statistics.names(measure), {"color": colour, "markersize": 4}
      figures.line_with_interval(axes, rows, "flops", names, line, label=name, **style)
    axes.axhline(fixed[-1][measure], color="#555555", linestyle=":", label="no pruning")
    for flops, rows in itertools.groupby(adapted, key=lambda row: row["flops"]):
      first = next(rows)
      axes.annotate(f"{first['threshold']:g}", (flops, first[measure]), (3, -9), textcoords="offset points", fontsize=7)
    label = "FLOPs of the decoder's prefill, all tokens and scoring, relative to no pruning"
    limits = 0.9 * fixed[0]["flops"], 1.1 * max(row["flops"] for row in adapted)
    figures.finish(axes, legend=10, xlim=limits, xlabel=label, ylabel=measure)
  return figure


def define_flags() -> None:
  ladder, thresholds = ["25%/6.25%", "50%/12.5%", "75%/37.5%"], "0.5 0.6 0.7 0.75 0.8 0.85 0.9 0.95 0.98".split()
  flags.DEFINE_list("ladder", ladder, "Keep counts of both stages for each rung, fewest tokens first.")
  flags.DEFINE_list("prune_layers", ["2", "8"], "HiMAP's layers, as in himap_jax.run.")
  flags.DEFINE_list("thresholds", thresholds, "Shares of attention that a rung's tokens must hold.")
  flags.DEFINE_integer("max_new_tokens", 8, "Maximum answer length, in tokens.", lower_bound=1)


def run(values: Any) -> study.Report:
  layers = flag_values.numbers(values["prune_layers"], int)
  thresholds = flag_values.numbers(values["thresholds"], float)
  keeps = flag_values.numbers(
    values["ladder"], lambda rung: tuple(map(flag_values.keep_count, rung.split("/"))), "such as 25%/6.25%"
  )
  if not thresholds or not all(0 < threshold <= 1 for threshold in thresholds):
    raise UserError("--thresholds: at least one is needed, each above 0 and at most 1")
  subject = study.load_subject(needs_answers=True)
  rungs = [subject.himap(layers, keep) for keep in keeps]
  counts = [[stage.keep for stage in rung.stages] for rung in rungs]
  if len(rungs) < 2 or not all(a[0] < b[0] and a[1] <= b[1] for a, b in itertools.pairwise(counts)):
    raise UserError("--ladder: at least two rungs are needed, in ascending order")
  workdir = study.workdir_for(subject, "prune_layers", "max_new_tokens")
  outcomes = measure(subject, rungs, workdir, max_new_tokens=values.max_new_tokens)
  fixed, adapted = rows(outcomes, thresholds, seed=subject.seed)
  lines, tables = summary(fixed, adapted, cheapest(outcomes)), {"adaptive": [*fixed, *adapted]}
  return study.Report(f"{outcomes.right.shape[1]} questions", lines, tables, {"adaptive": plot(fixed, adapted)})


if __name__ == "__main__":
  study.start("flow.adaptive", define_flags, run)
