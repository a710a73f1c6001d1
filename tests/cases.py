"""Draws some cases of expensive tests that have many: every test runs every time, and over many runs with every case."""

import collections
import math
import random
from collections.abc import Iterable

import pytest

ONE_IN = 3


def draw(items: Iterable[pytest.Item], seed: int) -> set[str]:
  """Ids of the cases to run: of every test marked `sampled` one in three of its cases, at least one."""
  by_test = collections.defaultdict(list)
  for item in items:
    if item.get_closest_marker("sampled"):
      by_test[item.nodeid.partition("[")[0]].append(item.nodeid)
  return {
    case
    for test, of_test in by_test.items()
    for case in random.Random(f"{seed} {test}").sample(of_test, math.ceil(len(of_test) / ONE_IN))
  }
