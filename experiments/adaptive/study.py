"""Answers on every rung of a ladder, and the attention that its tokens hold.

Axes: R rungs, Q questions, N image tokens.
"""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from experiments import kept
from experiments.flow import scores
from experiments.flow.answers import answers
from experiments.flow.subject import Batch, Subject
from experiments.question_sets import score
from himap_jax import adaptive, flops
from himap_jax.schedule import Schedule


class Outcomes(NamedTuple):
  """What the rungs come to, the cheapest first; no pruning is one more at the end of the first three.

  Attributes:
    price: `[R + 1, Q]` FLOPs of the decoder's prefill on all tokens and of choosing, in units of no pruning.
    right: `[R + 1, Q]` how right the answer is.
    same: `[R + 1, Q]` how much it is the one without pruning.
    mass: `[R, Q]` the share of the first stage's scores that the kept tokens hold.
    keep: of each rung, after each stage.
  """

  price: Float[np.ndarray, "P Q"]
  right: Float[np.ndarray, "P Q"]
  same: Float[np.ndarray, "P Q"]
  mass: Float[np.ndarray, "R Q"]
  keep: list[tuple[int, ...]]


def measure(studied: Subject, rungs: Sequence[Schedule], workdir: pathlib.Path, *, max_new_tokens: int) -> Outcomes:
  """Answers all questions on all rungs; what a work directory holds is not run again."""
  schedules = [*rungs, Schedule()]
  given = []
  for schedule in schedules:
    name = "_".join(str(stage.keep) for stage in schedule.stages) or "none"
    given.append(answers(studied, schedule, workdir / f"answers-{name}.json", max_new_tokens=max_new_tokens))
  questions = [question for question in studied.questions if question.id in given[-1]]
  held, lengths = _held_and_lengths(studied, rungs[0].stages[0].layer, workdir)
  return Outcomes(
    price=np.array([_prices(studied, schedule, [lengths[q.id] for q in questions]) for schedule in schedules]),
    right=np.array([[score(own[q.id], q.answer) for q in questions] for own in given]),
    same=np.array([[score(own[q.id], given[-1][q.id]) for q in questions] for own in given]),
    mass=np.array([[held[q.id][rung.stages[0].keep - 1] for q in questions] for rung in rungs]),
    keep=[tuple(stage.keep for stage in rung.stages) for rung in rungs],
  )


def _held_and_lengths(
  studied: Subject, layer: int, workdir: pathlib.Path
) -> tuple[dict[str, Float[np.ndarray, "N"]], dict[str, int]]:
  """By question the share of all scores that the highest hold, one, two and so on, and the prompt's text tokens."""
  held, lengths = {}, {}
  for batch in studied.batches("scores"):

    def score_batch(batch: Batch = batch) -> dict[str, np.ndarray]:
      received = scores.first_stage(studied.model, studied.loaded.params, batch.inputs, layer=layer)
      return {"held": np.asarray(adaptive.rank(received)[1])[: len(batch.questions)]}

    shares = kept.arrays_of(workdir / f"held-{batch.number:05d}.npz", score_batch)["held"]
    for question, share, length in zip(
      batch.questions, shares, batch.inputs.length, strict=False
    ):  # rows repeat the last
      held[question.id] = share
      lengths[question.id] = int(length) - studied.processor.num_image_tokens
  return held, lengths


def _prices(studied: Subject, schedule: Schedule, lengths: Sequence[int]) -> list[float]:
  def total(schedule: Schedule, length: int) -> int:
    costs = flops.costs(studied.loaded.config, schedule, studied.processor.num_image_tokens, length)
    return costs.decoder + costs.scoring

  by_length = {length: total(schedule, length) / total(Schedule(), length) for length in set(lengths)}
  return [by_length[length] for length in lengths]
