"""Converts a LLaVA checkpoint: configuration, check of names and shapes, then one tensor after another."""

import json
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import tqdm
from etils import epath

from checkpoints_convert import names, original, remote, store
from checkpoints_convert.marker import FORMAT, MARKER, read_marker
from checkpoints_convert.safetensors_reader import INDEX, StoredTensor, read_headers, read_tensor, some
from checkpoints_convert.source import SMALL_FILES, fingerprint, locate, read_json, write_json
from himap_jax import config as config_lib
from himap_jax.llava import abstract_params

_NOT_COPIED = ("config.json", INDEX, MARKER)


def convert(
  source: str | pathlib.Path,
  target: str | pathlib.Path | epath.Path,
  *,
  vision_tower: str | None = None,
  progress: bool = True,
) -> pathlib.Path | epath.Path:
  """Converts a checkpoint in one of three layouts: Hugging Face LLaVA with older or newer names, or LLaVA's original.

  The target holds the parameters (Orbax, in the stored dtype), a complete config.json, the tokenizer, processor and
  generation files, and a marker. It appears whole or not at all, in object storage as its marker does; a target made from the
  same files is left as it is.

  Args:
    source: a directory or a hub id.
    target: the directory to write, here or in object storage as `gs://bucket/name`.
    vision_tower: for the original layout, a directory or hub id instead of the one that its config.json names.
    progress: whether to show a bar and what was unused.

  Returns:
    `target`, absolute.

  Raises:
    ValueError: the source cannot be read, holds a model that this library does not run, or lacks names and shapes of
      the model that it describes; or the target holds something else or cannot be reached.
  """
  source = locate(str(source))
  target = remote.reach(target) if remote.is_remote(target) else pathlib.Path(target).expanduser().absolute()
  if any(character in str(target) for character in store.FORBIDDEN):
    raise ValueError(
      f"{target}: Orbax reads {' '.join(store.FORBIDDEN)} in a path as a pattern; name another directory"
    )
  fields = read_json(source / "config.json")
  stored, tower = _stored(source, fields, vision_tower)
  digest = _digest(source, tower)
  with store.locked(target):
    if _is_finished(target, digest):
      return target
    with store.new_directory(target) as (work, params):
      config = _write_configuration(work, source, tower, fields)
      plan = names.plan(stored, abstract_params(config, jnp.float32), config, str(source))
      if progress and plan.unused:
        print(
          f"{source.name}: {len(plan.unused)} tensors are not used by the model ({some(plan.unused)})", file=sys.stderr
        )
      store.save_params(params, _read(plan, progress))
      write_json(work / MARKER, {"format": FORMAT, "source": str(source), "fingerprint": digest, "dtypes": plan.dtypes})
  return target


def identity(source: pathlib.Path) -> str:
  """Digest that tells the conversion of a directory from those of other checkpoints, towers and downloads.

  Raises:
    ValueError: as `convert`, of the source.
  """
  _, tower = _stored(source, read_json(source / "config.json"), None)
  return _digest(source, tower)


def _digest(source: pathlib.Path, tower: pathlib.Path | None) -> str:
  return fingerprint(source) if tower is None else fingerprint(source, tower)


def _stored(
  source: pathlib.Path, fields: dict[str, Any], vision_tower: str | None
) -> tuple[list[tuple[names.Path | None, StoredTensor]], pathlib.Path | None]:
  """The tensors in a checkpoint's files by their paths in the parameter tree, and the tower of an original layout."""
  stored = [(names.tree_path(name), tensor) for name, tensor in read_headers(source).items()]
  if not original.is_original(fields):
    return stored, None
  original.check(fields, str(source / "config.json"))
  tower = _locate_tower(source, fields, vision_tower, has_weights=_has_tower(stored))
  if not _has_tower(stored):
    stored += [(names.tower_path(name), tensor) for name, tensor in read_headers(tower).items()]
  return stored, tower


def _read(plan: names.Plan, progress: bool) -> Iterator[tuple[names.Path, np.ndarray]]:
  with tqdm.tqdm(total=plan.num_bytes, unit="B", unit_scale=True, desc="converting", disable=not progress) as bar:
    for path, tensor in plan.tensors:
      yield path, read_tensor(tensor)
      bar.update(tensor.num_bytes)


def _is_finished(target: pathlib.Path | epath.Path, digest: str) -> bool:
  """Whether there is nothing to do.

  Raises:
    ValueError: `target` is in the way.
  """
  if (target.is_dir() and not any(target.iterdir())) or not target.exists() or remote.is_unfinished(target):
    return False
  marker = read_marker(target) if target.is_dir() else None
  if marker is None or marker.get("fingerprint") != digest:
    raise ValueError(f"{target} exists and was not converted from this source; name another directory or remove it")
  return True


def _write_configuration(
  work: pathlib.Path, source: pathlib.Path, tower: pathlib.Path | None, fields: dict[str, Any]
) -> config_lib.LlavaConfig:
  for path in sorted(path for pattern in SMALL_FILES for path in source.glob(pattern)):
    if path.name not in _NOT_COPIED and (tower is None or not path.name.startswith(("tokenizer", "special_tokens"))):
      shutil.copyfile(path, work / path.name)
  if tower is not None:
    tokens = original.tokenizer(source)
    image_token_id = tokens.convert_tokens_to_ids(original.IMAGE_TOKEN)
    original_fields, fields = fields, original.llava_fields(fields, tower, image_token_id)
    original.save_processor(work, tokens, tower, original_fields, fields)
  config = config_lib.from_hf(fields, where=str(source / "config.json"))
  write_json(work / "config.json", _complete(fields))
  if not (work / "generation_config.json").exists():
    write_json(work / "generation_config.json", _special_token_ids(fields))
  return config


def _complete(fields: dict[str, Any]) -> dict[str, Any]:
  """Every field that transformers knows of the model, so that its defaults may change."""
  import transformers

  complete = transformers.LlavaConfig(**{name: value for name, value in fields.items() if name != "model_type"})
  return json.loads(complete.to_json_string(use_diff=False))


def _special_token_ids(fields: dict[str, Any]) -> dict[str, Any]:
  given = fields.get("text_config", {}) | fields
  return {name: given[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if given.get(name) is not None}


def _has_tower(stored: list[tuple[names.Path | None, StoredTensor]]) -> bool:
  return any(path is not None and path[0] == "vision_tower" for path, _ in stored)


def _locate_tower(
  source: pathlib.Path, fields: dict[str, Any], given: str | None, *, has_weights: bool
) -> pathlib.Path:
  if fields.get("unfreeze_mm_vision_tower") and not has_weights:
    raise ValueError(f"{source}: its vision tower was trained (unfreeze_mm_vision_tower) but is not in its weights")
  name = given or fields["mm_vision_tower"]
  if not given and not pathlib.Path(name).is_absolute() and (source / name).is_dir():
    name = str(source / name)
  try:
    return locate(name, weights=not has_weights)
  except ValueError as error:
    raise ValueError(f"the vision tower of {source} (--vision_tower names another): {error}") from error
