"""From the name of a checkpoint to its parameters on their devices."""

import dataclasses
import json
import math
import os
import pathlib
import re
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from checkpoints_convert import remote, store
from checkpoints_convert.marker import PARAMS, read_marker
from checkpoints_convert.source import first_line, locate
from himap_jax import sharding
from himap_jax.config import LlavaConfig, load_config
from himap_jax.llava import abstract_params, logical_axes

READ_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True)
class LoadedModel:
  """A model ready to run.

  Attributes:
    config: its configuration, with as many key heads as `params` holds; see `sharding.with_divisible_key_heads`.
    params: the parameter tree, nested dicts of arrays.
    processor: transformers' processor: tokenizer, image processor and chat template.
    directory: the converted checkpoint.
    eos_token_ids: tokens that end an answer.
  """

  config: LlavaConfig
  params: PyTree
  processor: Any
  directory: pathlib.Path
  eos_token_ids: tuple[int, ...]

  @property
  def dtype(self) -> Any:
    """Of activations, and of all parameters that are not quantised."""
    return self.params["language_model"]["embed_tokens"]["weight"].dtype


def default_cache_dir() -> pathlib.Path:
  """`$HIMAP_JAX_CACHE`, else `himap_jax` in the user's cache folder."""
  base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return pathlib.Path(os.environ.get("HIMAP_JAX_CACHE") or pathlib.Path(base) / "himap_jax").expanduser()


def resolve(name: str, *, cache_dir: str | pathlib.Path | None = None) -> pathlib.Path | epath.Path:
  """The converted checkpoint of a name; what is not converted yet is converted into the cache, once.

  Args:
    name: `demo`, a converted directory, here or in object storage as `gs://bucket/name`, a directory in a layout that
      `checkpoints_convert` reads, or a hub id.
    cache_dir: where conversions are kept; `default_cache_dir()` when absent.

  Raises:
    ValueError: there is no such checkpoint, or it cannot be converted.
    RuntimeError: the demo model's packages could not be downloaded.
  """
  if remote.is_remote(name):
    return remote.reach(name)
  cache_dir = _absolute(cache_dir)
  if name == "demo":
    from checkpoints_convert.demo.assemble import assemble  # needs pip, which a run on another checkpoint does not

    source = assemble(cache_dir / "demo", cache_dir=cache_dir)
  else:
    source = locate(name)
  if read_marker(source) is not None:
    return source
  from checkpoints_convert.convert import convert, identity  # which itself imports this package

  label = re.sub(r"[^\w.-]+", "-", source.name if pathlib.Path(name).is_dir() else name)
  return convert(source, cache_dir / "converted" / f"{label}-{identity(source)[:16]}")


@dataclasses.dataclass(frozen=True)
class OpenCheckpoint:
  """A checkpoint whose settings are read and whose weights are not yet.

  Attributes:
    config: the model's configuration.
    processor: transformers' processor: tokenizer, image processor and chat template.
    directory: the converted checkpoint's files, or their copy where it lies in object storage.
    params: where its parameters are.
  """

  config: LlavaConfig
  processor: Any
  directory: pathlib.Path
  params: pathlib.Path | epath.Path

  def num_bytes(self, dtype: Any, *, quantize_decoder: bool = False) -> int:
    """Bytes of the weights; see `restore`."""
    params = abstract_params(self.config, dtype)
    if quantize_decoder:
      from himap_jax import quantization  # qwix is slow to import

      params = quantization.abstract_decoder(params)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))

  def restore(self, *, dtype: Any, mesh: Mesh | None = None, quantize_decoder: bool = False) -> LoadedModel:
    """Reads the weights, every device its own part of them.

    Args:
      dtype: of every parameter.
      mesh: the devices; the first one when absent.
      quantize_decoder: whether the decoder's weights become int8; see `quantization.quantize_decoder`.

    Raises:
      ValueError: the weights cannot be read.
    """
    mesh = sharding.make_mesh() if mesh is None else mesh
    abstract = abstract_params(self.config, dtype)
    params = _restore(self.params, sharding.placed(abstract, logical_axes(self.config), self.config, mesh))
    params = sharding.repeat_key_heads(params, self.config, mesh)
    if quantize_decoder:
      from himap_jax import quantization  # qwix is slow to import

      params = quantization.quantize_decoder(params)
    return LoadedModel(
      sharding.with_divisible_key_heads(self.config, mesh),
      params,
      self.processor,
      self.directory,
      _eos_token_ids(self.directory, self.processor),
    )


def open_checkpoint(name: str, *, cache_dir: str | pathlib.Path | None = None) -> OpenCheckpoint:
  """Finds a checkpoint, converts it where that is needed, and reads everything but its weights.

  Args:
    name: as `resolve` takes it.
    cache_dir: as `resolve` takes it.

  Raises:
    ValueError: there is no such checkpoint, or it cannot be converted or read.
    RuntimeError: the demo model's packages could not be downloaded.
  """
  directory = resolve(name, cache_dir=cache_dir)
  params = directory / PARAMS
  if remote.is_remote(directory):
    directory = store.copy_of_files(directory, _absolute(cache_dir))
  return OpenCheckpoint(load_config(directory), _load_processor(directory), directory, params)


def load(
  name: str,
  *,
  dtype: Any,
  cache_dir: str | pathlib.Path | None = None,
  mesh: Mesh | None = None,
) -> LoadedModel:
  """Opens and restores a checkpoint: see `open_checkpoint` and `OpenCheckpoint.restore`."""
  return open_checkpoint(name, cache_dir=cache_dir).restore(dtype=dtype, mesh=mesh)


def _absolute(cache_dir: str | pathlib.Path | None) -> pathlib.Path:
  return (default_cache_dir() if cache_dir is None else pathlib.Path(cache_dir).expanduser()).absolute()


def _restore(path: pathlib.Path | epath.Path, targets: PyTree) -> PyTree:
  """Reads straight into the shardings; beside the parameters the host holds `READ_BYTES` or the largest of them."""
  context = ocp.Context()
  largest = max(4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(targets))  # it may be stored in float32
  context.memory_options.read_concurrent_bytes = max(READ_BYTES, largest) + 1
  try:
    with context:
      return ocp.load(path, targets)
  except (ValueError, OSError, KeyError) as error:
    raise ValueError(
      f"{path}: cannot restore the parameters ({first_line(error)}); convert the checkpoint again"
    ) from error


def _load_processor(directory: pathlib.Path) -> Any:
  import transformers  # slow to import

  try:
    return transformers.AutoProcessor.from_pretrained(directory, local_files_only=True)
  except (ValueError, OSError, KeyError, TypeError) as error:
    raise ValueError(f"{directory}: cannot load the tokenizer and image processor ({first_line(error)})") from error


def _eos_token_ids(directory: pathlib.Path, processor: Any) -> tuple[int, ...]:
  try:
    ids = json.loads((directory / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id")
  except (OSError, ValueError):
    ids = None
  if ids is None:
    ids = processor.tokenizer.eos_token_id
  return tuple(ids) if isinstance(ids, (list, tuple)) else () if ids is None else (ids,)
