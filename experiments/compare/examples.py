"""Questions to look at: their pictures, and what every cell kept of them and answered."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.compare.grid import Cell
from experiments.compare.report import Example, Shown
from experiments.question_sets import Question
from himap_jax.images import load_image
from himap_jax.processing import Processor


def choose(questions: Sequence[Question], num_examples: int) -> list[Question]:
  """The first questions of every type in turns, each about a picture that no other is about."""
  by_type = collections.defaultdict(collections.deque)
  for question in questions:
    by_type[question.type].append(question)
  chosen: dict[Any, Question] = {}
  while len(chosen) < num_examples and any(by_type.values()):
    for waiting in by_type.values():
      while waiting and waiting[0].image in chosen:
        waiting.popleft()
      if waiting and len(chosen) < num_examples:
        question = waiting.popleft()
        chosen[question.image] = question
  return list(chosen.values())


def collect(
  questions: Sequence[Question],
  cells: Sequence[Cell],
  answers: Mapping[str, Mapping[str, Mapping[str, Any]]],
  processor: Processor,
) -> list[Example]:
  """What every cell that has run did with some questions; one that it could not answer is left out."""
  examples = []
  for question in questions:
    shown = {}
    for cell in cells:
      row = answers.get(cell.label, {}).get(question.id)
      if row is not None and row["error"] is None:
        layers = [stage.layer for stage in cell.schedule.stages]
        shown[cell.label] = Shown(row["answer"], list(zip(layers, row["kept"], strict=True)))
    if shown:
      picture = processor.picture(processor.prepare(load_image(question.image), question.question))
      grid = processor.patch_grid
      examples.append(Example(picture, grid, question.question, question.answer, question.type, shown))
  return examples
