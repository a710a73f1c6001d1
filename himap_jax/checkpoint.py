"""Checkpoints: from a name to a model on its devices."""

import contextlib
import dataclasses
import functools
import math
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import Mesh, Sharding
from jaxtyping import Array, Bool
from PIL import Image

from checkpoints_convert import convert, remote, store
from checkpoints_convert.demo.assemble import ADAPTERS, assemble
from checkpoints_convert.errors import CheckpointError
from checkpoints_convert.int8 import abstract_int8, quantize_and_delete
from checkpoints_convert.json_files import read_json
from checkpoints_convert.marker import read_marker
from checkpoints_convert.messages import some
from checkpoints_convert.names import ExpectedModel
from checkpoints_convert.source import PARAMS, AnyPath, locate
from checkpoints_convert.weights import ConvertedWeights, PublishedWeights, Weights
from himap_jax import arguments, families
from himap_jax.engine import sharding
from himap_jax.engine.accounting import method_inputs
from himap_jax.engine.capacity import BatchSizes
from himap_jax.engine.engine import Engine, GenerationConfig
from himap_jax.errors import UserError, check_bools, check_is
from himap_jax.families import files, templates
from himap_jax.families.family import Family, Processor
from himap_jax.families.limited import LimitedProcessor
from himap_jax.model.config import ModelConfig
from himap_jax.model.network import Model, Network, abstract_params, logical_axes
from himap_jax.model.quantization import can_be_int8, map_int8
from himap_jax.pruning.config import PruningConfig
from himap_jax.pruning.schedule import Schedule

DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}  # of parameters and activations
ASPECT_RATIOS = ("checkpoint", "pad")  # of pictures: as the checkpoint's processor has them, or padded to squares


@dataclasses.dataclass(frozen=True)
class OpenCheckpoint:
  """A checkpoint whose settings have been read but whose weights have not.

  Attributes:
    processor: transformers' processor: tokenizer, image processor and chat template.
    directory: the checkpoint's files; a local copy if they are in object storage.
    eos_token_ids: tokens that end an answer.
  """

  config: ModelConfig
  family: Family
  processor: Any
  directory: pathlib.Path
  eos_token_ids: tuple[int, ...]
  weights: Weights

  def prompts(self, template: str = "chat", max_image_tokens: int | None = None) -> Processor:
    """The processor for a prompt template, tried with a picture; arguments and errors as in `Family.processor`.

    Raises:
      UserError: also if the checkpoint's image processor fails, or it or the chat template would exhaust time or memory.
    """
    own, where = self.processor, str(self.directory)
    if template == "chat":
      own_templates = getattr(own, "chat_template", None) or own.tokenizer.chat_template
      templates.check(own_templates, where, own.tokenizer.special_tokens_map)
    with files.unusable(self.directory):
      files.check_image_processor(own.image_processor, f"{where}: preprocessor_config.json")
      files.check_image_token(own.tokenizer, self.family.image_token(own.tokenizer), self.config.image_token_id, where)
      processor = self.family.processor(own, self.config, template, max_image_tokens)
      processor = LimitedProcessor(processor, own.tokenizer, self.config.text)
      with contextlib.suppress(UserError):  # its template may hold no picture, or need more than a question
        processor.prepare([Image.new("RGB", (64, 48))], "?")
    return processor

  def with_aspect_ratio(self, name: str) -> "OpenCheckpoint":
    """The same checkpoint, for `pad` with pictures padded to squares; raises `UserError` if its family cannot pad.

    `name` is one of `ASPECT_RATIOS`.
    """
    if name == "checkpoint":
      return self
    if self.family.pad is None:
      raise UserError(f"pictures of {self.family.model_type} are not padded to squares; those of llava are")
    return dataclasses.replace(self, processor=self.family.pad(self.processor))

  def schedule(
    self,
    method: str,
    prune_layers: tuple[int, ...] | None = None,
    keep: tuple[int | float, ...] | None = None,
    parameters: Mapping[str, float] | None = None,
    *,
    restore: bool = False,
    keep_positions: bool = False,
  ) -> Schedule:
    """The schedule of a pruning method for this model, for prompts with any number of image tokens.

    Arguments and errors as in `pruning.config.build_schedule` and `PruningConfig`.
    """
    check_bools(restore=restore, keep_positions=keep_positions)
    keep, given = arguments.with_shares(keep), arguments.pairs_of(parameters)
    choice = PruningConfig(method, prune_layers, keep, given, restore, keep_positions)
    return choice.schedule(**method_inputs(self.config))

  def digest(self) -> str:
    """Digest of the contents of all files; the first call may read them all."""
    return self.weights.digest()

  def check_unchanged(self, digest: str) -> None:
    """Raises `UserError` if the digest is no longer this one."""
    if self.digest() != digest:
      raise UserError(f"{self.directory}: the checkpoint has changed since the run began; start it again")

  def num_bytes(self, dtype: Any, *, int8_weights: bool = False) -> int:
    """Size of the weights in bytes."""
    params = abstract_params(self.config, dtype)
    params = map_int8(abstract_int8, params) if int8_weights else params
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))

  def make_mesh(self, dtype: Any, batch_size: int | None = None, *, int8_weights: bool = False) -> Mesh:
    """A mesh of all devices that shards the weights no further than their size demands; see `sharding.choose_mesh`."""
    num_bytes = self.num_bytes(dtype, int8_weights=int8_weights)
    return sharding.make_mesh(**sharding.choose_mesh(self.config, num_bytes, batch_size))

  def restore(self, *, dtype: Any, mesh: Mesh | None = None, int8_weights: bool = False) -> "LoadedModel":
    """Reads the weights; each device reads only its own shards.

    Args:
      dtype: of every parameter that is not int8.
      mesh: the first device if absent.
      int8_weights: quantise the decoder's weights to int8, one at a time. Required for a checkpoint converted to int8.

    Raises:
      CheckpointError: the weights cannot be read or are not finite, or are int8 and `int8_weights` is false.
      UserError: the dtype is neither bfloat16 nor float32.
    """
    check_bools(int8_weights=int8_weights)
    dtype = _supported(dtype)
    if self.weights.is_int8 and not int8_weights:
      raise CheckpointError(
        f"{self.directory}: its decoder weights are int8; load it with --int8_weights, or convert the source again "
        "without that flag"
      )
    mesh = sharding.make_mesh() if mesh is None else mesh
    wide = sharding.with_divisible_key_heads(self.config, mesh)
    wanted = self._abstract(wide, dtype, mesh)
    params = _by_path(wanted)
    for path, array in self.weights.read(_by_path(self._abstract(self.config, dtype, mesh))):
      array = _repeat_heads(array, params[path], self.config.text.num_key_value_heads)
      if int8_weights and not self.weights.is_int8 and can_be_int8(path):
        array = quantize_and_delete(array)
      params[path] = array
      del array
    if bad := [".".join(path) for path, leaf in params.items() if not _is_finite(leaf)]:
      raise CheckpointError(f"{self.directory}: weights that are NaN or infinite in {dtype.name}: {some(bad)}")
    tree = jax.tree.unflatten(jax.tree.structure(wanted), params.values())
    model = Model(tree, Network(wide, dtype, sharding.kernels_for(mesh)))
    return LoadedModel(**vars(self) | {"config": wide}, model=model)

  def _abstract(self, config: ModelConfig, dtype: Any, mesh: Mesh) -> Any:
    """The stored parameters as `jax.ShapeDtypeStruct`s with their shardings."""
    params = sharding.placed(abstract_params(config, dtype), logical_axes(config), config, mesh)
    return map_int8(abstract_int8, params) if self.weights.is_int8 else params


@dataclasses.dataclass(frozen=True)
class LoadedModel(OpenCheckpoint):
  """A checkpoint with its weights on the devices, ready to run; the key heads of `config` include repeated ones."""

  model: Model

  def engine(
    self,
    schedule: Schedule,
    generation: GenerationConfig = GenerationConfig(),
    batch_sizes: BatchSizes = BatchSizes(),
    *,
    make: Callable[..., Engine] = Engine,
    **options: Any,
  ) -> Engine:
    """An engine of the model; by default its batch sizes are chosen from the memory of the devices.

    Args:
      make: called as `Engine` is.
      options: others of `Engine`.

    Raises:
      UserError: the schedule was made for a model that has what this one lacks.
    """
    arguments.check_fits(schedule, self.config)
    own = {"eos_token_ids": self.eos_token_ids, "batch_sizes": batch_sizes}
    return make(self.model, schedule, generation, **own, **options)


def load(
  name: str,
  *,
  dtype: Any,
  cache_dir: str | pathlib.Path | None = None,
  mesh: Mesh | None = None,
  allow_pickle: bool = False,
) -> LoadedModel:
  """Opens and restores a checkpoint: see `open_checkpoint` and `OpenCheckpoint.restore`."""
  if mesh is not None:
    check_is("mesh", mesh, Mesh, "a jax.sharding.Mesh, such as himap_jax.engine.sharding.make_mesh makes")
  return open_checkpoint(name, cache_dir=cache_dir, allow_pickle=allow_pickle).restore(dtype=dtype, mesh=mesh)


def open_checkpoint(
  name: str, *, cache_dir: str | pathlib.Path | None = None, allow_pickle: bool = False
) -> OpenCheckpoint:
  """Finds a checkpoint and reads everything but its weights.

  Args:
    name: `demo` or `demo_cross`; a directory or hub id in the Hugging Face layout, read as it is, or in LLaVA's original layout,
      converted once into the cache; or a converted directory, local or in object storage (`gs://bucket/name`).
    cache_dir: for conversions and digests; `default_cache_dir()` if absent.
    allow_pickle: whether pickled weights are read if there are no safetensors: their tensors alone, no code is run.
      Needs the extra `pickled`.

  Raises:
    CheckpointError: the checkpoint does not exist, or cannot be read, assembled or converted.
    UserError: the model is not supported.
  """
  check_is("name", name, (str, os.PathLike), "the name or the directory of a checkpoint")
  if cache_dir is not None:
    check_is("cache_dir", cache_dir, (str, os.PathLike), "a directory")
  check_bools(allow_pickle=allow_pickle)
  cache_dir = (default_cache_dir() if cache_dir is None else pathlib.Path(cache_dir).expanduser()).absolute()
  if remote.is_remote(name):
    directory: AnyPath = remote.reach(name)
  elif name in ADAPTERS:
    directory = assemble(cache_dir / name, name, cache_dir=cache_dir, adapter=ADAPTERS[name])
  else:
    directory = locate(name, allow_pickle=allow_pickle)
  params, weights = directory / PARAMS, None
  if remote.is_remote(directory):
    directory = store.copy_of_files(directory, cache_dir)
  elif read_marker(directory) is None:
    source = convert.open_source(directory, allow_pickle=allow_pickle)
    if source.tower is None:
      plan = source.plan(describe(source.fields, str(directory / "config.json")))
      weights = PublishedWeights(directory, plan.parameters, cache_dir)
    else:
      label = re.sub(r"[^\w.-]+", "-", directory.name if pathlib.Path(name).is_dir() else name)
      target = cache_dir / "converted" / f"{label}-{source.digest(cache_dir)[:16]}"
      directory = convert.convert_into_cache(source, target, describe, cache_dir=cache_dir)
      params = directory / PARAMS
  weights = weights or ConvertedWeights(params, directory, read_marker(directory), cache_dir)
  fields, where = read_json(directory / "config.json"), str(directory / "config.json")
  family = families.family_of(fields, where=where)
  processor, config = family.load_processor(directory), families.from_hf(fields, where=where)
  own = _eos_token_ids(directory, fields, processor, config.text.vocab_size)
  eos_token_ids = tuple(dict.fromkeys((*own, *family.stop_tokens(processor))))
  return OpenCheckpoint(config, family, processor, directory, eos_token_ids, weights)


def describe(fields: dict[str, Any], where: str) -> ExpectedModel:
  """The model expected by `checkpoints_convert` for a `config.json`; raises `UserError` if it is not supported."""
  family = families.family_of(fields, where=where)
  config = families.from_hf(fields, where=where)
  flat = traverse_util.flatten_dict(abstract_params(config, jnp.float32))
  shapes = {path: tuple(leaf.shape) for path, leaf in flat.items()}
  return ExpectedModel(
    family.complete(fields), shapes, config.vision.num_hidden_layers, frozenset(filter(can_be_int8, shapes))
  )


def _supported(dtype: Any) -> Any:
  with contextlib.suppress(TypeError, ValueError):
    if jnp.dtype(dtype) in map(jnp.dtype, DTYPES.values()):
      return jnp.dtype(dtype)
  raise UserError(f"dtype must be bfloat16 or float32, not {dtype!r}")


def default_cache_dir() -> pathlib.Path:
  """`$HIMAP_JAX_CACHE`, else `himap_jax` in the user's cache folder; raises `UserError` for a user without a home."""
  base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  try:
    return pathlib.Path(os.environ.get("HIMAP_JAX_CACHE") or pathlib.Path(base) / "himap_jax").expanduser()
  except RuntimeError as error:
    raise UserError("there is no home directory for a cache; name a directory in HIMAP_JAX_CACHE") from error


def _by_path(tree: Any) -> dict[tuple[str, ...], Any]:
  """Leaves by path; the values and scales of an int8 weight are separate leaves."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {tuple(getattr(entry, "key", None) or entry.name for entry in path): leaf for path, leaf in leaves}


def _is_finite(weight: Any) -> bool:
  """Whether an array, or the scales of an int8 weight, are all finite; waits, since CPUs run few collectives at a time."""
  leaves = [leaf for leaf in jax.tree.leaves(weight) if jnp.issubdtype(leaf.dtype, jnp.floating)]
  return all(bool(_all_finite(leaf)) for leaf in leaves)


@jax.jit
def _all_finite(x: Array) -> Bool[Array, ""]:
  """By the bits, which need no memory: infinite and NaN are above all others, with and without their sign."""

  def is_below(kind: str, limit: float) -> Bool[Array, ""]:
    bits, most = (
      jax.lax.bitcast_convert_type(own, jnp.dtype(f"{kind}{8 * x.dtype.itemsize}"))
      for own in (x, jnp.array(limit, x.dtype))
    )
    return bits.max() < most

  return is_below("int", jnp.inf) & is_below("uint", -jnp.inf)


def _repeat_heads(array: jax.Array, target: jax.ShapeDtypeStruct, num_heads: int) -> jax.Array:
  """Repeats the heads of key and value projections as the target requires; returns other arrays unchanged."""
  return array if array.shape == target.shape else _repeat_program(num_heads, target.shape, target.sharding)(array)


@functools.lru_cache
def _repeat_program(num_heads: int, shape: tuple[int, ...], sharding: Sharding) -> Callable[[jax.Array], jax.Array]:
  """Cached by shape, so that all layers share one compiled program."""

  def repeat(x: jax.Array) -> jax.Array:
    return jnp.repeat(x.reshape(num_heads, -1, *x.shape[1:]), shape[0] // x.shape[0], axis=0).reshape(shape)

  return jax.jit(repeat, out_shardings=sharding)


def _eos_token_ids(directory: pathlib.Path, fields: dict[str, Any], processor: Any, vocab_size: int) -> tuple[int, ...]:
  path = directory / "generation_config.json"
  ids = (read_json(path) if path.exists() else convert.generation_fields(fields)).get("eos_token_id")
  ids = processor.tokenizer.eos_token_id if ids is None else ids
  ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
  if any(type(own) is not int or not 0 <= own < vocab_size for own in ids):
    raise CheckpointError(
      f"{directory}: eos_token_id is {ids}; needed: a token id below {vocab_size}, or a list of them"
    )
  return tuple(ids)
