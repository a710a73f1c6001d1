"""LLaVA's original layout and converted copies, with a small file damaged or with values of any JSON in it."""

import functools
import pathlib
import shutil
import sys
from typing import Any

import numpy as np
from campaign import bounded, mutations
from campaign.trials import Part, Trial

from checkpoints_convert.errors import CheckpointError
from himap_jax.errors import UserError

INPUTS = 10
MAX_BYTES = 100_000  # of files that are damaged; those of weights are damaged elsewhere


def prepare(shared: pathlib.Path) -> Trial:
  from campaign import models  # with torch, which those who try the inputs do without

  sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "checkpoints"))
  import layouts

  published, original, converted = models.made(shared, "llava"), shared / "original", shared / "converted"
  for made, make in (
    (original, lambda target: layouts.make_original(published, target, tower_inside=True)),
    (converted, lambda target: layouts.convert_to(original, target)),
  ):
    if not made.exists():
      partial = made.with_name(f"{made.name}.partial")
      shutil.rmtree(partial, ignore_errors=True)
      make(partial)
      partial.rename(made)
  return bounded.trial(functools.partial(_attempts, (original, converted)), INPUTS, shared)


def _attempts(
  layouts: tuple[pathlib.Path, ...], random: np.random.Generator, directory: pathlib.Path, count: int
) -> Any:
  def damaged(number: int) -> str:
    own = directory / str(number)
    shutil.copytree(layouts[random.integers(len(layouts))], own / "checkpoint")
    paths = sorted(path for path in own.rglob("*") if path.is_file() and path.stat().st_size < MAX_BYTES)
    mutations.damage(random, paths[random.integers(len(paths))])
    outcome = _load(own)
    shutil.rmtree(own)
    return outcome

  return bounded.each(range(count), damaged)


def _load(own: pathlib.Path) -> str:
  from himap_jax import checkpoint

  try:
    loaded = checkpoint.load(str(own / "checkpoint"), dtype="float32", cache_dir=own / "cache")
    assert isinstance(loaded.prompts().prompt("Why?"), str)
  except (UserError, CheckpointError) as error:
    assert "\n" not in str(error), error
    return "refused"
  return "loaded"


PART = Part("A damaged original or converted checkpoint is loaded or refused in one line.", prepare, INPUTS)
