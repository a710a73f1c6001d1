"""Reads safetensors checkpoints: every header first, then one tensor at a time with plain file reads.

Nothing is mapped into memory, so what a conversion holds is what it has read and not yet released.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOAT_DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}

_ITEM_BYTES = {
  "BOOL": 1,
  "U8": 1,
  "I8": 1,
  "F8_E4M3": 1,
  "F8_E5M2": 1,
  "U16": 2,
  "I16": 2,
  "F16": 2,
  "BF16": 2,
  "U32": 4,
  "I32": 4,
  "F32": 4,
  "U64": 8,
  "I64": 8,
  "F64": 8,
}
_MAX_HEADER_BYTES = 100_000_000
_PICKLED = ("*.bin", "*.pth", "*.pt", "*.ckpt")


@dataclasses.dataclass(frozen=True)
class StoredTensor:
  """Where a tensor lies.

  Attributes:
    name: its name in the checkpoint.
    path: the file.
    dtype: the format's name of the dtype, for instance `BF16`.
    shape: its shape.
    offset: of its first byte in the file.
    num_bytes: its size.
  """

  name: str
  path: pathlib.Path
  dtype: str
  shape: tuple[int, ...]
  offset: int
  num_bytes: int


def read_headers(directory: pathlib.Path) -> dict[str, StoredTensor]:
  """The tensors of a checkpoint directory by name, in the order in which they lie on disk; no tensor is read.

  Reads the shards that `model.safetensors.index.json` names, else `model.safetensors`, else every `*.safetensors`.

  Raises:
    ValueError: no safetensors, a shard that is missing, truncated or corrupt, or a name stored twice.
  """
  weight_map = _read_index(directory / INDEX)
  stored: dict[str, StoredTensor] = {}
  for path in _shards(directory, weight_map):
    for tensor in read_header(path):
      if tensor.name in stored:
        raise ValueError(f"{path}: tensor {tensor.name} is also in {stored[tensor.name].path.name}")
      stored[tensor.name] = tensor
  absent = [name for name, shard in weight_map.items() if name not in stored or stored[name].path.name != shard]
  if absent:
    raise ValueError(
      f"{directory / INDEX}: {len(absent)} tensors are not in the shard that the index names "
      f"({some(absent)}); download the checkpoint again"
    )
  return stored


def read_header(path: pathlib.Path) -> list[StoredTensor]:
  """The tensors of one file, in the order in which they lie in it.

  Raises:
    ValueError: the file is truncated or is not safetensors.
  """
  file_bytes = path.stat().st_size
  with open(path, "rb") as file:
    prefix = file.read(8)
    header_bytes = int.from_bytes(prefix, "little")
    if prefix == b"version ":
      raise ValueError(f"{path}: a Git LFS pointer, not the weights; fetch them with `git lfs pull`")
    if len(prefix) < 8 or not 2 <= header_bytes <= _MAX_HEADER_BYTES:
      raise _corrupt(path, "it has no header")
    if 8 + header_bytes > file_bytes:
      raise _corrupt(path, f"truncated inside its header, at {file_bytes} bytes")
    header = file.read(header_bytes)
  try:
    fields = json.loads(header)
    fields.pop("__metadata__", None)
    tensors = [_stored_tensor(path, name, entry, 8 + header_bytes) for name, entry in fields.items()]
  except (ValueError, AttributeError, KeyError, TypeError) as error:
    raise _corrupt(path, f"unreadable header, {error}") from error
  tensors.sort(key=lambda tensor: tensor.offset)
  expected_bytes = max((tensor.offset + tensor.num_bytes for tensor in tensors), default=8 + header_bytes)
  if expected_bytes != file_bytes:
    kind = "truncated" if file_bytes < expected_bytes else "too long"
    raise _corrupt(path, f"{kind}: {file_bytes} bytes where its header describes {expected_bytes}")
  return tensors


def read_tensor(tensor: StoredTensor) -> np.ndarray:
  """Reads one tensor of a dtype in `FLOAT_DTYPES`.

  Raises:
    ValueError: the file became shorter since its header was read.
  """
  array = np.empty(tensor.shape, FLOAT_DTYPES[tensor.dtype])
  with open(tensor.path, "rb", buffering=0) as file:
    file.seek(tensor.offset)
    view, done = memoryview(array.reshape(-1).view(np.uint8)), 0
    while done < tensor.num_bytes:
      count = file.readinto(view[done:])
      if not count:
        raise _corrupt(tensor.path, f"ended while {tensor.name} was read")
      done += count
  return array


def some(items: Iterable[str], limit: int = 4) -> str:
  """The first few of `items`, for a message."""
  items = list(items)
  return ", ".join(items[:limit]) + (", …" if len(items) > limit else "")


def _stored_tensor(path: pathlib.Path, name: str, entry: dict[str, Any], start: int) -> StoredTensor:
  begin, end = entry["data_offsets"]
  shape = tuple(entry["shape"])
  if not all(type(number) is int and number >= 0 for number in (*shape, begin, end - begin)):
    raise ValueError(f"{name} has a negative size")
  item_bytes = _ITEM_BYTES.get(entry["dtype"])
  if item_bytes is not None and end - begin != item_bytes * math.prod(shape):
    raise ValueError(f"{name} has {end - begin} bytes, not those of {entry['dtype']} {list(shape)}")
  return StoredTensor(name, path, entry["dtype"], shape, start + begin, end - begin)


def _shards(directory: pathlib.Path, weight_map: dict[str, str]) -> list[pathlib.Path]:
  if weight_map:
    shards = [directory / name for name in sorted(set(weight_map.values()))]
    missing = [path.name for path in shards if not path.is_file()]
    if missing:
      raise ValueError(
        f"{directory}: {len(missing)} of {len(shards)} shards are missing ({some(missing)}); download them again"
      )
    return shards
  if (directory / SINGLE).is_file():
    return [directory / SINGLE]
  shards = sorted(directory.glob("*.safetensors"))
  if not shards:
    raise ValueError(_no_safetensors(directory))
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
  raise ValueError(f"{path}: not an index of safetensors shards; download it again")


def _no_safetensors(directory: pathlib.Path) -> str:
  pickled = sorted(path.name for pattern in _PICKLED for path in directory.glob(pattern))
  found = f"only pickled weights ({some(pickled)}), which can run code when read" if pickled else "no weights"
  return (
    f"{directory}: {found}; safetensors are needed. If you trust the checkpoint, write them with transformers: "
    "`Model.from_pretrained(SOURCE).save_pretrained(TARGET, safe_serialization=True)` with the class that its "
    "config.json names (for LLaVA's original layout: `safetensors.torch.save_file(torch.load(FILE, "
    "weights_only=True), FILE.safetensors)` for each file)"
  )


def _corrupt(path: pathlib.Path, what: str) -> ValueError:
  return ValueError(f"{path}: not a whole safetensors file ({what}); download it again")
