"""The collectives of a compiled program."""

import collections
import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_COLLECTIVE = re.compile(rf"= (?P<shapes>.+?) (?P<kind>{'|'.join(KINDS)})(-start)?\((?P<rest>.*)")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_SCOPE = re.compile(r'op_name="([^"]*)"')


class Collective(NamedTuple):
  """One collective of a program; a loop's body is counted once."""

  kind: str  # one of `KINDS`
  num_bytes: int  # of its result on one device
  scope: str  # enclosing named scopes


def collectives(compiled: Any) -> list[Collective]:
  found = []
  for line in compiled.as_text().splitlines():
    if match := _COLLECTIVE.search(line):
      scope = _SCOPE.search(match["rest"])
      shapes = _SHAPE.findall(match["shapes"])
      if line.count("-start(") and len(shapes) > 1:
        shapes = shapes[len(shapes) // 2 :]  # operands come first
      found.append(Collective(match["kind"], sum(map(_num_bytes, shapes)), scope[1] if scope else ""))
  return found


def _num_bytes(shape: tuple[str, str]) -> int:
  kind, sizes = shape
  bits = 8 if kind == "pred" else int(re.search(r"\d+", kind)[0])
  return -(-math.prod(map(int, filter(None, sizes.split(",")))) * bits // 8)


def summarize(found: Iterable[Collective]) -> str:
  counts, sizes = collections.Counter(), collections.Counter()
  for one in found:
    counts[one.kind] += 1
    sizes[one.kind] += one.num_bytes
  return ", ".join(f"{count} {kind} {sizes[kind] / 2**20:.1f} MiB" for kind, count in counts.items()) or "none"
