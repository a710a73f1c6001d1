"""Tokenizers, image processors and chat templates of every family, damaged; and values of any JSON in them."""

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
    mutations.damage(random, paths[random.integers(len(paths))])
    outcome = _open(own)
    shutil.rmtree(own)
    return outcome

  return bounded.each(range(count), damaged)


def _small_files(directory: pathlib.Path) -> list[pathlib.Path]:
  found = [path for pattern in SMALL_FILES for path in directory.glob(pattern)]
  return sorted(path for path in found if "index" not in path.name)


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
