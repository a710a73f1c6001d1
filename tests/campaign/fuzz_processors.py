"""Tokenizers, image processors and chat templates of every family, damaged; and values of any JSON in them."""

import copy
import functools
import json
import pathlib
import shutil
from typing import Any

import numpy as np
from campaign import bounded, mutations
from campaign.trials import Part, Trial

from checkpoints_convert.errors import CheckpointError
from checkpoints_convert.source import SMALL_FILES
from himap_jax.errors import UserError

INPUTS = 20
VALUES = (
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


def prepare(shared: pathlib.Path) -> Trial:
  from campaign import models  # with torch, which those who try the inputs do without

  for name in models.MAKERS:
    models.made(shared, name)
  return bounded.trial(functools.partial(_attempts, shared / "models"), INPUTS, shared)


def _attempts(checkpoints: pathlib.Path, random: np.random.Generator, directory: pathlib.Path, count: int) -> Any:
  names = sorted(path.name for path in checkpoints.iterdir())

  def damaged(number: int) -> str:
    name, own = str(random.choice(names)), directory / str(number)
    own.mkdir()
    for path in _small_files(checkpoints / name):
      shutil.copy(path, own)
    paths = [path for path in _small_files(own) if path.name != "config.json"]
    path = paths[random.integers(len(paths))]
    content = path.read_bytes()
    if path.suffix == ".json" and random.random() < 0.5:
      path.write_text(json.dumps(replaced(random, json.loads(content))))
    else:
      path.write_bytes(mutations.mutated(random, content))
    outcome = _open(own)
    shutil.rmtree(own)
    return outcome

  return bounded.each(range(count), damaged)


def _small_files(directory: pathlib.Path) -> list[pathlib.Path]:
  found = [path for pattern in SMALL_FILES for path in directory.glob(pattern)]
  return sorted(path for path in found if "index" not in path.name)


def replaced(random: np.random.Generator, fields: dict) -> dict:
  """The fields with one to three replaced, of which a third are inside others."""
  for _ in range(random.integers(1, 4)):
    own, name = fields, str(random.choice(list(fields)))
    if isinstance(own[name], dict) and own[name] and random.random() < 0.7:
      own, name = own[name], str(random.choice(list(own[name])))
    own[name] = copy.deepcopy(VALUES[random.integers(len(VALUES))])
  return fields


def _open(directory: pathlib.Path) -> str:
  from himap_jax import checkpoint, families

  fields = json.loads((directory / "config.json").read_text())
  try:
    family, config = families.family_of(fields), families.from_hf(fields)
    opened = checkpoint.OpenCheckpoint(config, family, family.load_processor(directory), directory, (), None)
    assert isinstance(opened.prompts().prompt("Why?"), str)
  except (UserError, CheckpointError) as error:
    assert "\n" not in str(error), error
    return "refused"
  return "read"


PART = Part("Any tokenizer, image processor or chat template is used or refused in one line.", prepare, INPUTS)
