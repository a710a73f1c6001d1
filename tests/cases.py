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
  """Ids of the items marked `sampled` that run: one in four, at least one, of every group.

  A group is the cases of a test, all tests marked `sampled(of=group)`, or the files marked `sampled(of=group, by="file")`.
  Of an item with several marks all must draw it.
  """
  groups: dict[str, dict[str, None]] = collections.defaultdict(dict)
  marked = {}
  for item in items:
    for marker in item.iter_markers("sampled"):
      assert not marker.args and set(marker.kwargs) <= {"of", "by"}, item.nodeid
      file, test = item.nodeid.partition("::")[0], item.nodeid.partition("[")[0]
      group, unit = marker.kwargs.get("of", test), file if marker.kwargs.get("by") == "file" else item.nodeid
      groups[group][unit] = None
      marked.setdefault(item.nodeid, []).append(unit)
  drawn = {
    unit
    for group, units in groups.items()
    for unit in random.Random(f"{seed} {group}").sample(list(units), math.ceil(len(units) / ONE_IN))
  }
  return {nodeid for nodeid, units in marked.items() if drawn.issuperset(units)}
