"""What is run, from which prompts, into which output."""

import dataclasses
import pathlib

from himap_jax.run.model_flags import AnswerConfig
from himap_jax.run.prompts import Columns


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(AnswerConfig):
  """A run; fields have the names and meanings of the flags of `himap_jax.run`."""

  prompts: pathlib.Path
  output: pathlib.Path
  split: str | None = None
  columns: Columns = Columns()
  image_dir: pathlib.Path = pathlib.Path()
  emit: frozenset[str] = frozenset()
  pictures: pathlib.Path | None = None
  resume: bool = True
  strict: bool = False
  profile_dir: pathlib.Path | None = None
