"""The collectives and the kernels of a compiled program."""

import collections
import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_COLLECTIVE = re.compile(rf"= (?P<shapes>.+?) (?P<kind>{'|'.join(KINDS)})(-start)?\((?P<rest>.*)")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_SCOPE = re.compile(r'op_name="([^"]*)"')
_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\) -> .* \{$")
_OPERATION = re.compile(r"  (?:ROOT )?%?[\w.\-]+ = .*?[\])}] (?P<kind>[\w\-]+)\((?P<rest>.*)")
_BODY = re.compile(r"(?:body|to_apply)=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# Operations without a kernel of their own.
FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "iota", "after-all", "partition-id"}


class Collective(NamedTuple):
  """One collective of a program; a loop's body is counted once."""

  kind: str  # one of `KINDS`
  num_bytes: int  # of its result on one device
  scope: str  # enclosing named scopes


def collectives(compiled: Any) -> list[Collective]:
  """The collectives in the text of a compiled program, in its order."""
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
  """Number and bytes of collectives by kind, as text in MiB."""
  counts, sizes = collections.Counter(), collections.Counter()
  for one in found:
    counts[one.kind] += 1
    sizes[one.kind] += one.num_bytes
  return ", ".join(f"{count} {kind} {sizes[kind] / 2**20:.1f} MiB" for kind, count in counts.items()) or "none"


class KernelCounts(NamedTuple):
  """What one run of a program starts, by the scope of each operation: kernels, and passes through loops."""

  kernels: collections.Counter[str]
  passes: collections.Counter[str]


def count_kernels(compiled: Any) -> KernelCounts:
  """Counts the kernels of a program for a GPU.

  A loop's body counts as often as it runs, once if that is unknown; its condition does not count. A conditional and
  a custom call are one kernel each.
  """
  computations: dict[str, list[re.Match[str]]] = {}
  for line in compiled.as_text().splitlines():
    if start := _COMPUTATION.match(line):
      own = computations.setdefault("" if start["entry"] else start["name"], [])
    elif operation := _OPERATION.match(line):
      own.append(operation)
  found = KernelCounts(collections.Counter(), collections.Counter())

  def walk(name: str, times: int, loop: str | None) -> None:
    for operation in computations[name]:
      named = _SCOPE.search(operation["rest"])
      scope = loop or (named[1] if named else "")
      if operation["kind"] == "while":
        trips = _TRIPS.search(operation["rest"])
        passes = times * (int(trips[1]) if trips else 1)
        found.passes[scope] += passes
        walk(_BODY.search(operation["rest"])[1], passes, scope)
      elif operation["kind"] == "call":
        walk(_BODY.search(operation["rest"])[1], times, loop)
      elif operation["kind"] not in FREE and not operation["kind"].endswith("-done"):
        found.kernels[scope] += times

  walk("", 1, None)
  return found
