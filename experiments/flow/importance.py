"""Does HiMAP keep tokens with information or tokens with attention? Manipulates scores and contents.

    python -m experiments.flow.importance --flagfile=experiments/flags/importance.flags

Pairs of questions with the same text about different pictures are answered with the row's own scores, its partner's,
shuffled and reversed ones; and with the partner's hidden states at the tokens chosen by the partner's or by the row's
own scores. In pictures whose middle comes from another picture, the scores show whether they follow content or
position.

Axes: B batch, Q questions, M image tokens. Consecutive rows of a batch are partners: one question about two pictures.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Array, Float

from experiments.flow.decoder import himap_scores
from experiments.question_sets import Question, is_right
from experiments.shared import statistics, study, tabular
from experiments.shared.subject import Batch, Subject
from himap_jax.errors import UserError
from himap_jax.inputs import take_slots
from himap_jax.pruning.method import Selection, View, highest, stable_top_k
from himap_jax.pruning.methods.himap import image_attention, instruction_attention
from himap_jax.pruning.schedule import Schedule
from himap_jax.run import flag_values

MAX_NEW_TOKENS = 6

Pair = tuple[Question, Question]  # the same text about different pictures, with different answers
Answers = dict[str, dict[str, str]]  # by schedule and question


def partner(x: Array) -> Array:
  """Swaps the values of partners."""
  return x.reshape(-1, 2, *x.shape[1:])[:, ::-1].reshape(x.shape)


def shuffled(view: View, scores: Float[Array, "B M"]) -> Float[Array, "B M"]:
  keys = jax.vmap(lambda key: jax.random.fold_in(key, view.layer))(view.keys)
  return jax.vmap(jax.random.permutation)(keys, scores)


# Manipulations of a stage's scores; the picture stays the same.
MANIPULATIONS: dict[str, Callable[[View, Float[Array, "B M"]], Float[Array, "B M"]]] = {
  "own": lambda view, scores: scores,
  "partner's": lambda view, scores: partner(scores),
  "shuffled": shuffled,
  "reversed": lambda view, scores: -scores,
}


def with_scores(schedule: Schedule, name: str) -> Schedule:
  """HiMAP's schedule with scores manipulated as in `MANIPULATIONS`.

  At the second stage partners have kept different tokens; the partner's score is that of its token of the same rank.
  """
  stages = []
  for stage, score in zip(schedule.stages, (instruction_attention, image_attention), strict=True):
    criterion = highest(lambda view, score=score: MANIPULATIONS[name](view, score(view)), stage.criterion.cost)
    stages.append(dataclasses.replace(stage, criterion=criterion))
  return Schedule(tuple(stages))


def with_partner_contents(schedule: Schedule, *, chosen_by_partner: bool) -> Schedule:
  """HiMAP's schedule with the partner's hidden states after the first stage, at tokens of either's choice."""
  first, second = schedule.stages

  def select(view: View, keep: int) -> Selection:
    scores = instruction_attention(view)
    kept = jnp.sort(stable_top_k(partner(scores) if chosen_by_partner else scores, keep), axis=1)
    return Selection(kept, take_slots(partner(view.image_tokens()), kept))

  replaced = dataclasses.replace(first, criterion=dataclasses.replace(first.criterion, select=select))
  return Schedule((replaced, second))


def schedules(own: Schedule) -> dict[str, Schedule]:
  return {
    "no pruning": Schedule(),
    **{f"scores: {name}": with_scores(own, name) for name in MANIPULATIONS},
    "partner's contents, its scores": with_partner_contents(own, chosen_by_partner=True),
    "partner's contents, own scores": with_partner_contents(own, chosen_by_partner=False),
  }


def make_pairs(questions: Sequence[Question], num_pairs: int, *, seed: int) -> list[Pair]:
  by_text: dict[str, list[Question]] = collections.defaultdict(list)
  for question in questions:
    by_text[question.question].append(question)
  rng, pairs = np.random.default_rng(seed), []
  for group in by_text.values():
    rest = [group[index] for index in rng.permutation(len(group))]
    while rest:
      one = rest.pop()
      other = next((q for q in rest if q.answer != one.answer and q.image != one.image), None)
      if other is not None:
        rest.remove(other)
        pairs.append((one, other))
  return [pairs[index] for index in sorted(rng.permutation(len(pairs))[:num_pairs])]


def window_of(grid: tuple[int, int]) -> tuple[slice, ...]:
  """The central rows and columns of a grid of patches, half of each."""
  return tuple(slice(round(side / 4), round(side * 3 / 4)) for side in grid)


def swapped(
  pixels: Float[np.ndarray, "Q P 3 h w"], others: Float[np.ndarray, "Q P 3 h w"], grid: tuple[int, int]
) -> Float[np.ndarray, "Q P 3 h w"]:
  """Pictures with their central patches replaced by those of others."""
  middle = tuple(
    slice(window.start * side // count, window.stop * side // count)
    for window, side, count in zip(window_of(grid), pixels.shape[-2:], grid, strict=True)
  )
  result = pixels.copy()
  result[..., *middle] = others[..., *middle]
  return result


def correlations(subject: Subject, batch: Batch, layer: int) -> dict[str, Float[np.ndarray, "2"]]:
  """Correlations of first-stage scores, after a pair's middles are swapped, with those before, inside and outside."""
  grid, images = subject.processor.patch_grid, batch.inputs.images
  inside = np.zeros(grid, bool)
  inside[window_of(grid)] = True
  pixels = swapped(images.pixels, images.pixels[::-1], grid)
  mixed = batch.inputs.replace(images=images.replace(pixels=pixels))
  before, after = (
    np.asarray(himap_scores(subject.loaded.model, inputs, num_layers=layer)[0][-1]) for inputs in (batch.inputs, mixed)
  )
  return {
    f"{place}, {whose}": np.array([np.corrcoef(a[where], b[where])[0, 1] for a, b in zip(after, other, strict=True)])
    for place, where in (("inside", inside.ravel()), ("outside", ~inside.ravel()))
    for whose, other in (("own", before), ("other's", before[::-1]))
  }


def answer_rows(pairs: Sequence[Pair], answers: Answers, *, seed: int) -> list[tabular.Row]:
  """One row per schedule: how often the answer is right, and equal to either picture's answer without pruning."""
  plain, rows = answers["no pruning"], []
  both = [(own, other) for pair in pairs for own, other in (pair, pair[::-1])]
  for name, given in answers.items():
    shares = {
      "right": [is_right(given[own.id], own.answer) for own, _ in both],
      "as the row's own picture unpruned": [is_right(given[own.id], plain[own.id]) for own, _ in both],
      "as the partner's picture unpruned": [is_right(given[own.id], plain[other.id]) for own, other in both],
    }
    rows.append({"schedule": name} | means(shares, seed=seed))
  return rows


def means(values: Mapping[str, Sequence[float]], *, seed: int) -> tabular.Row:
  """Means over pairs of consecutive values, with intervals."""
  pairs = {name: np.asarray(each, np.float64).reshape(1, -1, 2).mean(axis=2) for name, each in values.items()}
  return statistics.mean_rows(pairs, seed=seed)[0]


def summary(measured: Sequence[tabular.Row], correlations: tabular.Row) -> list[str]:
  def columns(row: tabular.Row, form: str) -> dict[str, str]:
    names = [name for name in row if name != "schedule" and not name.endswith(("_low", "_high"))]
    return {name: tabular.with_interval(name, form) for name in names}

  lines = ["## Answers", "", *tabular.formatted(measured, {"": "{schedule}"} | columns(measured[0], ".1%"))]
  lines += ["", "## Scores of pictures whose middle comes from another", ""]
  lines += ["Correlation of the first stage's scores with those of the row's own picture and of the other one.", ""]
  return [*lines, *tabular.formatted([correlations], columns(correlations, ".2f"))]


def define_flags() -> None:
  flags.DEFINE_integer("num_pairs", 50, "Number of question pairs, drawn from --num_questions.", lower_bound=1)
  flags.DEFINE_list("prune_layers", ["2", "8"], "HiMAP's layers, as in himap_jax.run.")
  flags.DEFINE_list("keep", ["50%", "12.5%"], "HiMAP's keep counts, as in himap_jax.run.")


def run(values: Any) -> study.Report:
  layers = flag_values.numbers(values["prune_layers"], int)
  keep = flag_values.numbers(values["keep"], flag_values.keep_count)
  subject = study.load_subject(needs_answers=True)
  schedule = subject.himap(layers, keep)
  if subject.processor.num_image_tokens != math.prod(subject.processor.patch_grid):
    raise UserError(
      f"the checkpoint's {subject.processor.num_image_tokens} image tokens are not the patches of the picture"
    )
  questions = [question for question, *_ in subject.examples("reading")]
  pairs = make_pairs(questions, values.num_pairs, seed=subject.seed)
  if not pairs:
    raise UserError("no two questions have the same text, different pictures and different answers; use more questions")
  workdir = study.workdir_for(subject, "num_pairs", "prune_layers", "keep")
  # Paired questions share their text, hence their bucket, and fill a batch.
  paired = dataclasses.replace(subject, questions=list(itertools.chain(*pairs)), batch_size=2)
  answers = paired.answers(schedules(schedule), workdir / "answers", max_new_tokens=MAX_NEW_TOKENS)
  first = schedule.stages[0].layer
  _, each = paired.measure(workdir / "correlations", lambda batch: correlations(paired, batch, first), axis=0)
  rows, correlation = answer_rows(pairs, answers, seed=subject.seed), means(each, seed=subject.seed)
  tables = {"importance": rows, "correlations": [correlation]}
  return study.Report(f"{len(pairs)} pairs", summary(rows, correlation), tables)


if __name__ == "__main__":
  study.start("flow.importance", define_flags, run)
