"""How questions are answered, and what is run, from which prompts, into which output."""

import dataclasses
import pathlib

from jax.sharding import Mesh

from himap_jax import checkpoint
from himap_jax.checkpoint import LoadedModel, OpenCheckpoint
from himap_jax.engine import sharding
from himap_jax.engine.engine import GenerationConfig
from himap_jax.generation import InputConfig
from himap_jax.pruning.config import PruningConfig
from himap_jax.run.prompts import Columns
from himap_jax.run.user_errors import out_of_memory_is_user_error


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerConfig:
  """How questions are answered, as configured by the flags of these names; `mesh` is None if it is to be chosen."""

  checkpoint: str
  pruning: PruningConfig = PruningConfig()
  generation: GenerationConfig = GenerationConfig()
  inputs: InputConfig = InputConfig()
  dtype: str = "bfloat16"
  int8_weights: bool = False
  mesh: dict[str, int] | None = None
  compilation_cache_dir: str = ""
  allow_pickle: bool = False
  allow_urls: bool = False
  image_aspect_ratio: str = "checkpoint"

  def open(self) -> OpenCheckpoint:
    opened = checkpoint.open_checkpoint(self.checkpoint, allow_pickle=self.allow_pickle)
    return opened.with_aspect_ratio(self.image_aspect_ratio)

  def make_mesh(self, opened: OpenCheckpoint) -> Mesh:
    if self.mesh:
      return sharding.make_mesh(**self.mesh)
    return opened.make_mesh(checkpoint.DTYPES[self.dtype], self.inputs.batch_size, int8_weights=self.int8_weights)

  def restore(self, opened: OpenCheckpoint, mesh: Mesh) -> LoadedModel:
    with out_of_memory_is_user_error():
      return opened.restore(dtype=checkpoint.DTYPES[self.dtype], mesh=mesh, int8_weights=self.int8_weights)


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
