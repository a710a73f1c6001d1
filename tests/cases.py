"""Draws some cases of expensive tests that have many, and some of expensive tests that resemble one another.

Over many runs all of them run.
"""

import collections
import math
import random
from collections.abc import Iterable

import pytest

ONE_IN = 4


def draw(items: Iterable[pytest.Item], seed: int) -> set[str]:
  """Ids of the items to run: one in four, at least one, of each test marked `sampled` and of all `sampled(of=group)`."""
  groups = collections.defaultdict(list)
  for item in items:
    if marker := item.get_closest_marker("sampled"):
      assert not marker.args and set(marker.kwargs) <= {"of"}, item.nodeid
      groups[marker.kwargs.get("of", item.nodeid.partition("[")[0])].append(item.nodeid)
  return {
    drawn
    for group, nodeids in groups.items()
    for drawn in random.Random(f"{seed} {group}").sample(nodeids, math.ceil(len(nodeids) / ONE_IN))
  }
