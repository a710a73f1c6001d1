"""Answers of a subject's model to all its questions."""

import pathlib

from experiments import kept
from experiments.flow.subject import Subject
from himap_jax.generation import Generator
from himap_jax.schedule import Schedule


def answers(studied: Subject, schedule: Schedule, path: pathlib.Path, *, max_new_tokens: int) -> dict[str, str]:
  """The greedy answers by question, from a file where it is there.

  Args:
    studied: model and questions; one that cannot be asked has no answer.
    schedule: what happens to the image tokens.
    path: the file.
    max_new_tokens: the longest answer, in tokens.
  """

  def ask() -> dict[str, str]:
    generator = Generator(studied.loaded, schedule, max_new_tokens=max_new_tokens, seed=studied.seed)
    given = {}
    for batch in studied.batches(path.stem):
      tokens = generator(batch.inputs, batch.row_ids).tokens
      given |= dict(zip(batch.row_ids, map(studied.processor.decode, tokens), strict=True))
    return given

  return kept.json_of(path, ask)
