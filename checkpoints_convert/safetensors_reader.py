"""Reads safetensors checkpoints: all headers first, then one tensor, or a part of it, at a time."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from checkpoints_convert.errors import CheckpointError
from checkpoints_convert.source import first_line, some

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOAT_DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}

# A part of an array: a slice for each axis.
Index = tuple[slice, ...]

# Messages of the safetensors library about incomplete files → their meaning.
_DAMAGE = {
  "header too small": "it has no header",
  "header too large": "it has no header",
  "invalid header length": "truncated inside its header",
  "not fully covered": "truncated, or too long: its header describes another size",
}
_PICKLED = ("*.bin", "*.pth", "*.pt", "*.ckpt")


@dataclasses.dataclass(frozen=True)
class StoredTensor:
  """Location, dtype (by its safetensors name, such as `BF16`) and shape of a stored tensor."""

  name: str
  path: pathlib.Path
  dtype: str
  shape: tuple[int, ...]

  @property
  def num_bytes(self) -> int:
    """Size in bytes, for dtypes in `FLOAT_DTYPES`."""
    return FLOAT_DTYPES[self.dtype].itemsize * math.prod(self.shape)

  def reader(self) -> Callable[[Any], np.ndarray]:
    """A function that reads the part an index names, or the whole tensor for `...`."""
    return safe_open(self.path, "np").get_slice(self.name).__getitem__


def read_headers(directory: pathlib.Path) -> dict[str, StoredTensor]:
  """The tensors of a checkpoint directory by name, in their order on disk; no tensor is read.

  Reads the shards that `model.safetensors.index.json` names, else `model.safetensors`, else every `*.safetensors`.
  Raises `CheckpointError` if there are none, a shard is missing, truncated or corrupt, or a name is stored twice.
  """
  weight_map = _read_index(directory / INDEX)
  stored: dict[str, StoredTensor] = {}
  for path in _shards(directory, weight_map):
    for tensor in _read_header(path):
      if tensor.name in stored:
        raise CheckpointError(f"{path}: tensor {tensor.name} is also in {stored[tensor.name].path.name}")
      stored[tensor.name] = tensor
  absent = [name for name, shard in weight_map.items() if name not in stored or stored[name].path.name != shard]
  if absent:
    raise CheckpointError(
      f"{directory / INDEX}: {len(absent)} tensors are not in the shard that the index names "
      f"({some(absent)}); download the checkpoint again"
    )
  return stored


def _read_header(path: pathlib.Path) -> list[StoredTensor]:
  try:
    with open(path, "rb") as file:
      if file.read(8) == b"version ":
        raise CheckpointError(f"{path}: a Git LFS pointer, not the weights; fetch them with `git lfs pull`")
    with safe_open(path, "np") as file:
      slices = {name: file.get_slice(name) for name in file.offset_keys()}
      return [StoredTensor(name, path, one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()]
  except SafetensorError as error:
    what = first_line(error).removeprefix("Error while deserializing header: ")
    reason = next((text for words, text in _DAMAGE.items() if words in what), f"unreadable header, {what}")
    raise CheckpointError(
      f"{path}: not a complete safetensors file ({reason}; it has {path.stat().st_size} bytes); download it again"
    ) from error
  except OSError as error:
    raise CheckpointError(f"{path}: cannot be read ({first_line(error)})") from error


def _shards(directory: pathlib.Path, weight_map: dict[str, str]) -> list[pathlib.Path]:
  if weight_map:
    shards = [directory / name for name in sorted(set(weight_map.values()))]
    missing = [path.name for path in shards if not path.is_file()]
    if missing:
      raise CheckpointError(
        f"{directory}: {len(missing)} of {len(shards)} shards are missing ({some(missing)}); download them again"
      )
    return shards
  if (directory / SINGLE).is_file():
    return [directory / SINGLE]
  shards = sorted(directory.glob("*.safetensors"))
  if not shards:
    raise CheckpointError(_no_safetensors(directory))
  return shards


def _read_index(path: pathlib.Path) -> dict[str, str]:
  if not path.is_file():
    return {}
  try:
    weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    if weight_map and all(pathlib.PurePath(shard).name == shard for shard in weight_map.values()):
      return weight_map
  except (ValueError, KeyError, TypeError, AttributeError):
    pass
  raise CheckpointError(f"{path}: not an index of safetensors shards; download it again")


def _no_safetensors(directory: pathlib.Path) -> str:
  pickled = sorted(path.name for pattern in _PICKLED for path in directory.glob(pattern))
  found = f"only pickled weights ({some(pickled)}), which can run code when read" if pickled else "no weights"
  return (
    f"{directory}: {found}; safetensors are needed. If you trust the checkpoint, write them with transformers: "
    "`Model.from_pretrained(SOURCE).save_pretrained(TARGET, safe_serialization=True)` with the class that its "
    "config.json names (for LLaVA's original layout: `safetensors.torch.save_file(torch.load(FILE, "
    "weights_only=True), FILE.safetensors)` for each file)"
  )
