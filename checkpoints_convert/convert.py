"""Converts a checkpoint: writes its configuration, checks names and shapes, then writes one tensor at a time."""

import dataclasses
import hashlib
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from checkpoints_convert import names, original, remote, store
from checkpoints_convert.digest import content_digest, tree_digest
from checkpoints_convert.errors import CheckpointError
from checkpoints_convert.int8 import quantize
from checkpoints_convert.json_files import read_json, write_json
from checkpoints_convert.marker import FORMAT, MARKER, read_marker
from checkpoints_convert.messages import first_line, some
from checkpoints_convert.progress import byte_bar
from checkpoints_convert.shards import PICKLED, SAFETENSORS, read_headers
from checkpoints_convert.source import HUB_ID, PARAMS, SMALL_FILES, AnyPath, locate
from checkpoints_convert.stored import FLOAT_DTYPES, StoredTensor

_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_NOT_COPIED = ("config.json", SAFETENSORS.index, PICKLED.index, MARKER)

# Maps the fields of a Hugging Face config.json, and its path for messages, to the model that they describe.
Describe = Callable[[dict[str, Any], str], names.ExpectedModel]


@dataclasses.dataclass(frozen=True)
class Source:
  """A published checkpoint; its headers have been read, its weights have not.

  Attributes:
    fields: contents of `config.json`.
    tensors: tensors in the weight files.
    tower: the vision tower in LLaVA's original layout; None in the Hugging Face layout.
    tower_tensors: tensors in the tower's files, unless the checkpoint holds them itself.
  """

  directory: pathlib.Path
  fields: dict[str, Any]
  tensors: tuple[StoredTensor, ...]
  tower: original.Tower | None = None
  tower_tensors: tuple[StoredTensor, ...] = ()

  def plan(self, model: names.ExpectedModel) -> names.Plan:
    """The reading plan; errors as in `names.plan`."""
    entries = names.TABLES[model.fields["model_type"]].entries
    of_tower = () if self.tower is None else names.TOWER_ENTRIES[self.tower.model_type]
    stored = names.place_names(self.tensors, (*of_tower, *entries), model.fields)
    stored += names.place_names(self.tower_tensors, (*of_tower, names.Entry("^", "vision_tower.")), model.fields)
    return names.plan(stored, model, str(self.directory))

  def digest(self, cache_dir: pathlib.Path) -> str:
    """Digest of the content of all files, including the tower's; see `content_digest`."""
    digest = content_digest(self.directory, {tensor.path for tensor in self.tensors}, cache_dir)
    if self.tower is None:
      return digest
    tower = content_digest(self.tower.directory, {tensor.path for tensor in self.tower_tensors}, cache_dir)
    return hashlib.sha256((digest + tower).encode()).hexdigest()


def open_source(name: str | pathlib.Path, vision_tower: str | None = None, *, allow_pickle: bool = False) -> Source:
  """Finds a published checkpoint, a directory or a Hub id, and reads the headers of its weights.

  For the original layout, `vision_tower` replaces the one in config.json. `allow_pickle` tells whether pickled weights
  are read if there are no safetensors. Raises `CheckpointError` if a file is missing, incomplete or unreadable, or the
  checkpoint is a converted one.
  """
  directory = locate(str(name), allow_pickle=allow_pickle)
  if read_marker(directory) is not None:
    raise CheckpointError(f"{directory}: already converted; himap_jax.run reads it as it is")
  fields = read_json(directory / "config.json")
  tensors = tuple(read_headers(directory, allow_pickle=allow_pickle).values())
  if not original.is_original(fields):
    return Source(directory, fields, tensors)
  original.check(fields, str(directory / "config.json"))
  stored = names.place_names(tensors, names.TABLES[original.MODEL_TYPE].entries, fields)
  has_tower = any(parameter.path[0] == "vision_tower" for parameter in stored)
  found = _locate_tower(directory, fields, vision_tower, has_weights=has_tower, allow_pickle=allow_pickle)
  tower = original.open_tower(found, vision_tower or fields["mm_vision_tower"])
  tower_tensors = () if has_tower else tuple(read_headers(found, allow_pickle=allow_pickle).values())
  return Source(directory, fields, tensors, tower, tower_tensors)


def convert(
  source: Source, target: str | AnyPath, describe: Describe, *, cache_dir: pathlib.Path, int8_weights: bool = False
) -> AnyPath:
  """Converts a checkpoint in the Hugging Face layout, with old or new names, or in LLaVA's original layout.

  The target holds the parameters (Orbax, in the stored dtype), a complete config.json, the tokenizer, processor and
  generation files, and a marker. It is written atomically (in object storage, by writing the marker last); a target
  made from the same files is left unchanged.

  Args:
    target: a directory, or `gs://bucket/name` in object storage.
    describe: maps a config.json to the model that it describes.
    cache_dir: cache of file digests.
    int8_weights: whether the weights in `ExpectedModel.int8` are quantized to int8 values and scales.

  Returns:
    `target`, absolute.

  Raises:
    CheckpointError: the source lacks names or shapes of the model that it describes, or the target holds something else
      or cannot be reached.
  """
  target = remote.reach(target) if remote.is_remote(target) else pathlib.Path(os.path.expanduser(target)).absolute()
  if any(character in str(target) for character in store.FORBIDDEN):
    raise CheckpointError(
      f"{target}: Orbax reads {' '.join(store.FORBIDDEN)} in a path as a pattern; name another directory"
    )
  fingerprint = source.digest(cache_dir) + ("-int8" if int8_weights else "")
  if _is_finished(target, fingerprint):
    return target
  with store.locked(target):
    if _is_finished(target, fingerprint):  # another process may have converted it by now
      return target
    with store.new_directory(target) as (work, params):
      model = _write_configuration(work, source, describe)
      plan = source.plan(model)
      if plan.unused:
        unused = f"{len(plan.unused)} tensors are not used by the model ({some(plan.unused)})"
        print(f"{source.directory.name}: {unused}", file=sys.stderr)
      store.save_params(params, _read(plan, model.int8 if int8_weights else frozenset()))
      content = {"format": FORMAT, "source": str(source.directory), "fingerprint": fingerprint}
      dtypes = sorted({FLOAT_DTYPES[parameter.tensor.dtype].name for parameter in plan.parameters})
      content["params"] = None if remote.is_remote(target) else tree_digest(params, cache_dir)
      write_json(work / MARKER, content | {"dtypes": dtypes, "int8_weights": int8_weights})
  return target


def convert_into_cache(
  source: Source, target: pathlib.Path, describe: Describe, *, cache_dir: pathlib.Path
) -> pathlib.Path:
  """As `convert`; but a damaged copy in the target, which is our own, is replaced."""
  if target.exists() and not _is_whole(target, cache_dir):
    with store.locked(target):
      if target.exists() and not _is_whole(target, cache_dir):  # another process may have replaced it by now
        print(f"{target}: damaged or of another version; it is converted again", file=sys.stderr)
        shutil.rmtree(target)
  return convert(source, target, describe, cache_dir=cache_dir)


def _is_whole(target: pathlib.Path, cache_dir: pathlib.Path) -> bool:
  try:
    marker = read_marker(target)
    return marker is not None and marker.get("params") == tree_digest(target / PARAMS, cache_dir)
  except (CheckpointError, OSError):
    return False


def _read(plan: names.Plan, int8: frozenset[names.Path]) -> Iterator[tuple[names.Path, np.ndarray]]:
  with byte_bar(sum(parameter.tensor.num_bytes for parameter in plan.parameters), "converting") as bar:
    for parameter in plan.parameters:
      array = parameter.reader()(...)
      if parameter.path in int8:
        weight = quantize(jnp.asarray(array))
        yield (*parameter.path, "qvalue"), np.asarray(weight.qvalue)
        yield (*parameter.path, "scale"), np.asarray(weight.scale)
      else:
        yield parameter.path, array
      bar.update(parameter.tensor.num_bytes)


def _is_finished(target: AnyPath, fingerprint: str) -> bool:
  """Whether the target holds this conversion; raises `CheckpointError` where it holds something else."""
  if (target.is_dir() and not any(target.iterdir())) or not target.exists() or remote.is_unfinished(target):
    return False
  marker = read_marker(target) if target.is_dir() else None
  if marker is None or marker.get("fingerprint") != fingerprint:
    raise CheckpointError(
      f"{target} exists and was not converted from this source; name another directory or remove it"
    )
  return True


def _write_configuration(work: pathlib.Path, source: Source, describe: Describe) -> names.ExpectedModel:
  directory, tower, fields = source.directory, source.tower, source.fields
  for path in sorted(path for pattern in SMALL_FILES for path in directory.glob(pattern)):
    if path.name not in _NOT_COPIED and (tower is None or not path.name.startswith(("tokenizer", "special_tokens"))):
      copy = work / path.relative_to(directory)
      copy.parent.mkdir(exist_ok=True)
      shutil.copyfile(path, copy)
  if tower is not None:
    tokens = original.tokenizer(directory)
    fields = original.llava_fields(fields, tower, tokens.convert_tokens_to_ids(original.IMAGE_TOKEN))
    original.save_processor(work, tokens, tower, source.fields)
  model = describe(fields, str(directory / "config.json"))
  write_json(work / "config.json", model.fields)
  if not (work / "generation_config.json").exists():
    write_json(work / "generation_config.json", generation_fields(fields))
  return model


def generation_fields(fields: dict[str, Any]) -> dict[str, Any]:
  """The special tokens in a checkpoint without generation_config.json, from the fields of its config.json.

  As in transformers' `GenerationConfig.from_model_config`, those of the whole model come before the language model's.
  """
  whole = {name: value for name, value in fields.items() if value is not None}
  given = (fields.get("text_config") or {}) | whole
  return {name: given[name] for name in _SPECIAL_TOKENS if given.get(name) is not None}


def _locate_tower(
  directory: pathlib.Path, fields: dict[str, Any], given: str | None, *, has_weights: bool, allow_pickle: bool
) -> pathlib.Path:
  if fields.get("unfreeze_mm_vision_tower") and not has_weights:
    raise CheckpointError(
      f"{directory}: its vision tower was trained (unfreeze_mm_vision_tower) but is not in its weights"
    )
  try:
    name = given or _named_tower(directory.resolve(), fields["mm_vision_tower"])
    return locate(name, weights=not has_weights, allow_pickle=allow_pickle)
  except (OSError, ValueError) as error:
    raise CheckpointError(
      f"the vision tower of {directory} (--vision_tower names another): {first_line(error)}"
    ) from error


def _named_tower(directory: pathlib.Path, name: Any) -> str:
  """The tower that config.json names: a folder inside the checkpoint's, else a Hub id; raises `CheckpointError` for others."""
  if isinstance(name, str):
    path = (directory / name).resolve()
    if path.is_dir() and path.is_relative_to(directory):
      return str(path)
    published = original.published_tower(name)
    if HUB_ID.fullmatch(published) and not pathlib.Path(name).exists():
      return published
  raise CheckpointError(
    f"mm_vision_tower is {repr(name)[:80]}; needed: a folder inside the checkpoint, or a Hugging Face id (owner/name)"
  )
