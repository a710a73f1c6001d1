"""Answers to pairs of pictures under manipulated scores and contents, and scores of pictures with swapped patches.

Axes: Q questions, N image tokens.
"""

import dataclasses
import pathlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from absl import logging
from jaxtyping import Float
from tqdm import tqdm

from experiments import kept
from experiments.flow import scores
from experiments.flow.subject import Subject
from experiments.importance import manipulations
from experiments.importance.manipulations import MANIPULATIONS
from experiments.question_sets import Question
from himap_jax.generation import Generator
from himap_jax.llava import Inputs
from himap_jax.schedule import Schedule

MAX_NEW_TOKENS = 6
SHARE = 0.5  # of the picture's width and height that a swapped window takes


@dataclasses.dataclass(frozen=True)
class Pair:
  """Two questions with the same text about different pictures, with different answers."""

  questions: tuple[Question, Question]


def askable(studied: Subject) -> list[Question]:
  """The questions that can be prepared; the others are left out with a warning."""
  found = []
  for question in tqdm(studied.questions, desc="reading", unit="question", disable=None):
    try:
      studied.example(question)
    except ValueError as error:
      logging.warning("%s is left out: %s", question.id, error)
    else:
      found.append(question)
  return found


def make_pairs(questions: Sequence[Question], num_pairs: int, *, seed: int) -> list[Pair]:
  """Draws pairs, each question in one at most."""
  by_text: dict[str, list[Question]] = defaultdict(list)
  for question in questions:
    by_text[question.question].append(question)
  rng = np.random.default_rng(seed)
  pairs = []
  for group in by_text.values():
    rest = [group[index] for index in rng.permutation(len(group))]
    while rest:
      one = rest.pop()
      other = next((q for q in rest if q.answer != one.answer and q.image != one.image), None)
      if other is not None:
        rest.remove(other)
        pairs.append(Pair((one, other)))
  order = rng.permutation(len(pairs))[:num_pairs]
  return [pairs[index] for index in sorted(order.tolist())]


def schedules(own: Schedule) -> dict[str, Schedule]:
  """What every pair is answered with: no pruning, manipulated scores, and the partner's contents."""
  return (
    {"no pruning": Schedule()}
    | {f"scores: {name}": manipulations.with_scores(own, name) for name in MANIPULATIONS}
    | {
      "partner's contents, its scores": manipulations.with_partner_s_contents(own, chosen_by_partner=True),
      "partner's contents, own scores": manipulations.with_partner_s_contents(own, chosen_by_partner=False),
    }
  )


def answers(
  studied: Subject, pairs: Sequence[Pair], own: Schedule, workdir: pathlib.Path
) -> dict[str, list[tuple[str, str]]]:
  """For every schedule the answers to each pair, from a file where they are there."""
  result = {}
  for name, schedule in tqdm(schedules(own).items(), desc="answering", unit="schedule", disable=None):
    path = workdir / f"answers-{''.join(c if c.isalnum() else '_' for c in name)}.json"

    def ask(name: str = name, schedule: Schedule = schedule) -> list[tuple[str, str]]:
      generator = Generator(studied.loaded, schedule, max_new_tokens=MAX_NEW_TOKENS, seed=studied.seed)
      return [_answer(studied, generator, pair) for pair in tqdm(pairs, desc=name, unit="pair", disable=None)]

    result[name] = [tuple(pair) for pair in kept.json_of(path, ask)]
  return result


def _answer(studied: Subject, generator: Generator, pair: Pair) -> tuple[str, str]:
  inputs = _inputs(studied, [studied.example(question) for question in pair.questions])
  tokens = generator(inputs, [question.id for question in pair.questions]).tokens
  return studied.processor.decode(tokens[0]), studied.processor.decode(tokens[1])


def _inputs(studied: Subject, examples: Sequence) -> Inputs:
  bucket = max(map(studied.processor.bucket, examples))
  return studied.processor.batch(examples, bucket=bucket, batch_size=len(examples))


def swapped(
  first: Float[np.ndarray, "3 h w"], second: Float[np.ndarray, "3 h w"], grid: tuple[int, int]
) -> Float[np.ndarray, "3 h w"]:
  """The first picture with the patches in the middle of the second."""
  rows, columns = (
    slice(window.start * side // count, window.stop * side // count)
    for window, side, count in zip(_window(grid), first.shape[1:], grid, strict=True)
  )
  result = first.copy()
  result[:, rows, columns] = second[:, rows, columns]
  return result


def _window(grid: tuple[int, int]) -> tuple[slice, slice]:
  """The middle of a grid of patches."""
  return tuple(slice(round(side * (1 - SHARE) / 2), round(side * (1 + SHARE) / 2)) for side in grid)


def correlations(studied: Subject, pairs: Sequence[Pair], layer: int) -> list[dict[str, float]]:
  """Where the middle of a picture comes from another, whose scores it has there.

  Returns:
    For each question the correlation of its first-stage scores with those of its own picture and of the other one, in the
    window that was swapped and outside.
  """
  rows = []
  grid = studied.processor.patch_grid
  inside = np.zeros(grid, bool)
  inside[_window(grid)] = True
  inside = inside.ravel()
  for pair in tqdm(pairs, desc="swapping patches", unit="pair", disable=None):
    examples = [studied.example(question) for question in pair.questions]
    pixels = [example.pixel_values for example in examples]
    mixed = [
      dataclasses.replace(example, pixel_values=swapped(pixels[number], pixels[1 - number], grid))
      for number, example in enumerate(examples)
    ]
    plain, changed = (
      np.asarray(scores.first_stage(studied.model, studied.loaded.params, _inputs(studied, part), layer=layer))
      for part in (examples, mixed)
    )
    for number in range(2):
      row = {}
      for place, where in (("inside", inside), ("outside", ~inside)):
        for whose, other in (("own", number), ("other's", 1 - number)):
          row[f"{place}, {whose}"] = float(np.corrcoef(changed[number][where], plain[other][where])[0, 1])
      rows.append(row)
  return rows
