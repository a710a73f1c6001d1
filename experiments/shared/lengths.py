"""Answers of very different lengths: a third is a word, a third a sentence, a third a paragraph."""

import numpy as np

LENGTHS = ((1, 3), (8, 24), (64, 128))  # tokens of a word, a sentence and a paragraph
LONGEST = LENGTHS[-1][-1]


def draw_lengths(num_rows: int) -> tuple[int, ...]:
  """As many of each kind, in random order; always the same."""
  rng = np.random.default_rng(0)
  lengths = [rng.integers(*LENGTHS[row % len(LENGTHS)], endpoint=True) for row in range(num_rows)]
  return tuple(map(int, rng.permutation(lengths)))
