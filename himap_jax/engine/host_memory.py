"""The memory that this process may still take on its host: of the machine, or of the control groups that limit it.

A container has the memory of its control group, not that of the machine.
"""

import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import psutil

OWN_GROUPS, ALL_GROUPS = pathlib.Path("/proc/self/cgroup"), pathlib.Path("/sys/fs/cgroup")


class Files(NamedTuple):
  """A version's files of a control group, and the field of its `memory.stat` that counts unused pages of files."""

  limit: str
  usage: str
  reclaimable: str


V1 = Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = Files("memory.max", "memory.current", "inactive_file")


def available(own: pathlib.Path = OWN_GROUPS, groups: pathlib.Path = ALL_GROUPS) -> int:
  """Free bytes: the least of the machine and of the control groups that this process is in."""
  return min([psutil.virtual_memory().available, *_left_by_groups(own, groups)])


def _left_by_groups(own: pathlib.Path, groups: pathlib.Path) -> Iterator[int]:
  """Bytes that each control group with a limit leaves (`man 7 cgroups`, and the kernel's cgroup-v2 and v1 `memory`)."""
  try:
    lines = own.read_text().splitlines()
  except OSError:  # not Linux
    return
  for line in lines:
    number, controllers, path = line.split(":", 2)
    if number == "0" and not controllers:
      files, root = V2, groups
    elif "memory" in controllers.split(","):
      files, root = V1, groups / "memory"
    else:
      continue
    group = root / path.strip("/")
    for directory in (group, *group.parents):  # a group has the limits of those that hold it
      if directory == root.parent:
        break
      left = _left(directory, files)
      if left is not None:
        yield left


def _left(group: pathlib.Path, files: Files) -> int | None:
  """Bytes that one group leaves; None if it has no limit, or none that can be seen from a container."""
  try:
    limit = (group / files.limit).read_text().strip()
    if limit == "max":
      return None
    usage = int((group / files.usage).read_text())
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
  except OSError:
    return None
  return max(0, int(limit) - usage + int(stat.get(files.reclaimable, 0)))
