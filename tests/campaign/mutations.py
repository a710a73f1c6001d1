"""Damage: changes of bytes, and values that no file should have."""

import copy
import json
import pathlib
from typing import Any

import numpy as np
from campaign import bounded
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

HUGE = (0, -1, 1, 255, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**64, 10**9, 10**30)

# Values of JSON, among them numbers and texts that readers tend to trip over.
NUMBERS = st.sampled_from(HUGE) | st.integers(-3, 3) | st.floats(width=32)
TEXTS = st.text(max_size=6) | st.sampled_from(
  ["", " ", "<image>", "\ud800", "\x00", "nan", "1e999", "../x", "{{", "a" * 500]
)
VALUES = st.recursive(
  st.none() | st.booleans() | NUMBERS | TEXTS,
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
  max_leaves=4,
)

REPLACEMENTS = (  # of fields in files
  None,
  True,
  0,
  -1,
  1,
  3,
  7.5,
  10**6,
  10**9,
  10**30,
  "",
  "x",
  [],
  [1],
  {},
  {"height": 10**6, "width": 1},
  float("nan"),
)


def mutated(random: np.random.Generator, data: bytes, other: bytes = b"") -> bytes:
  """The data with one to four changes; the spliced text comes from `other`."""
  for _ in range(random.integers(1, 5)):
    data = _changed(random, data, other or data)
  return data


def _changed(random: np.random.Generator, data: bytes, other: bytes) -> bytes:
  size = len(data)
  # headers matter most, and are at the start
  at = int(random.integers(min(size, 64) + 1 if random.random() < 0.5 else size + 1))
  end = min(size, at + int(random.integers(1, 17)))
  match random.choice(["flip", "cut", "insert", "swap", "splice", "number", "truncate", "digits"]):
    case "flip":
      return data[:at] + bytes([data[at] ^ (1 << random.integers(8))]) + data[at + 1 :] if at < size else data
    case "cut":
      return data[:at] + data[end:]
    case "insert":
      return data[:at] + random.bytes(int(random.integers(1, 9))) + data[at:]
    case "swap":
      return data[:at] + data[end : 2 * end - at] + data[at:end] + data[2 * end - at :]
    case "splice":
      start = int(random.integers(len(other) + 1))
      return data[:at] + other[start : start + int(random.integers(1, 65))] + data[end:]
    case "number":
      width, order = int(random.choice([2, 4, 8])), str(random.choice(["little", "big"]))
      number = int(random.choice(np.array(HUGE, object))) % (1 << 8 * width)
      return data[:at] + number.to_bytes(width, order) + data[at + width :]
    case "truncate":
      return data[:at]
  return data[:at] + str(random.choice(np.array(HUGE, object))).encode() + data[end:]


def damage(random: np.random.Generator, path: pathlib.Path) -> None:
  """Changes bytes of a file or, for half of the JSON files, values."""
  content = path.read_bytes()
  if path.suffix == ".json" and random.random() < 0.5:
    path.write_text(json.dumps(_replaced(random, json.loads(content))))
  else:
    path.write_bytes(mutated(random, content))


def _replaced(random: np.random.Generator, fields: dict) -> dict:
  """The fields with one to three replaced, of which a third are inside others."""
  for _ in range(random.integers(1, 4)):
    own, name = fields, str(random.choice(list(fields)))
    if isinstance(own[name], dict) and own[name] and random.random() < 0.7:
      own, name = own[name], str(random.choice(list(own[name])))
    own[name] = copy.deepcopy(REPLACEMENTS[random.integers(len(REPLACEMENTS))])
  return fields


def structured(random: np.random.Generator, count: int, strategy: st.SearchStrategy, attempt: Any) -> dict[str, int]:
  """Counts the outcomes of examples of a strategy; a failure is reported with the simplest example found."""
  found: dict[str, int] = {}

  @seed(int(random.integers(1 << 32)))
  @settings(
    max_examples=count,
    database=None,
    deadline=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
  )
  @given(strategy)
  def test(example: Any) -> None:
    outcome = bounded.in_time(attempt, example)
    found[outcome] = found.get(outcome, 0) + 1

  test()
  return found
