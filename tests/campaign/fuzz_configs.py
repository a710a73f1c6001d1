"""`config.json` of every family: values replaced by any JSON, and damaged files."""

import collections
import copy
import functools
import json
import pathlib
from typing import Any

import numpy as np
from campaign import bounded, mutations
from campaign.trials import Part, Trial
from hypothesis import strategies as st

from checkpoints_convert.errors import CheckpointError
from checkpoints_convert.json_files import read_json
from himap_jax import families
from himap_jax.errors import UserError

INPUTS = 100


def prepare(shared: pathlib.Path) -> Trial:
  from campaign import models  # with torch, which those who try the inputs do without

  configs = [json.loads((models.made(shared, name) / "config.json").read_text()) for name in models.MAKERS]
  return bounded.trial(functools.partial(_attempts, configs), INPUTS, shared)


def _attempts(configs: list[dict], random: np.random.Generator, directory: pathlib.Path, count: int) -> Any:
  path, texts = directory / "config.json", [json.dumps(fields).encode() for fields in configs]

  def damaged(number: int) -> str:
    del number
    index, other = random.integers(len(texts), size=2)
    path.write_bytes(mutations.mutated(random, texts[index], texts[other]))
    return _read(path)

  def replaced(change: tuple[int, list[tuple[float, Any]]]) -> str:
    index, changes = change
    fields = copy.deepcopy(configs[index])
    for place, value in changes:
      paths = sorted(_paths(fields), key=str)
      _put(fields, paths[int(place * (len(paths) - 1))], value)
    path.write_text(json.dumps(fields))
    return _read(path)

  found: collections.Counter[str] = bounded.each(range(count // 2), damaged)
  change = st.tuples(st.floats(0, 1), mutations.VALUES)
  changes = st.tuples(st.integers(0, len(configs) - 1), st.lists(change, min_size=1, max_size=3))
  found.update(mutations.structured(random, count - count // 2, changes, replaced))
  return found


def _read(path: pathlib.Path) -> str:
  try:
    families.from_hf(read_json(path), where=str(path))
  except (UserError, CheckpointError) as error:
    assert "\n" not in str(error) and str(path) in str(error), error
    return "refused"
  return "read"


def _paths(value: Any) -> list[tuple]:
  """The paths of all fields."""
  items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
  return [path for key, inner in items for path in ((key,), *((key, *rest) for rest in _paths(inner)))]


def _put(fields: Any, path: tuple, value: Any) -> None:
  for key in path[:-1]:
    fields = fields[key]
  fields[path[-1]] = value


PART = Part("Any config.json is read or refused in one line that names it.", prepare, INPUTS)
