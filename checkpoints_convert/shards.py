"""The weight files of a checkpoint: which of them are read, and whether they hold what their index says."""

import json
import pathlib
from collections.abc import Callable
from typing import NamedTuple

from checkpoints_convert import pickle_reader, safetensors_reader
from checkpoints_convert.errors import CheckpointError
from checkpoints_convert.messages import first_line, some
from checkpoints_convert.source import PICKLED_FILES, SAFETENSORS_FILES, TRAINING_FILES
from checkpoints_convert.stored import StoredTensor


class Format(NamedTuple):
  """A format of weight files.

  Attributes:
    files: pattern of their names.
    single: name of a file that holds all weights.
    index: name of the index of several.
    read_header: the tensors of a file, none of them read; raises `CheckpointError`.
  """

  files: str
  single: str
  index: str
  read_header: Callable[[pathlib.Path], list[StoredTensor]]


SAFETENSORS = Format(
  SAFETENSORS_FILES, "model.safetensors", "model.safetensors.index.json", safetensors_reader.read_header
)
PICKLED = Format(PICKLED_FILES, "pytorch_model.bin", "pytorch_model.bin.index.json", pickle_reader.read_header)


def read_headers(directory: pathlib.Path, *, allow_pickle: bool = False) -> dict[str, StoredTensor]:
  """The tensors of a checkpoint directory by name, in their order on disk; no tensor is read.

  Reads safetensors if there are any, else, with `allow_pickle`, pickled weights: of either, the shards that the index
  names, else the single file, else every file that is not of a training's state. Raises `CheckpointError` if there are
  none, a file is missing, truncated or corrupt, a name is stored twice, or a pickle asks for more than tensors.
  """
  kind = _format(directory, allow_pickle)
  weight_map = _read_index(directory / kind.index)
  stored: dict[str, StoredTensor] = {}
  for path in _shards(directory, kind, weight_map):
    for tensor in _read_header(path, kind):
      if tensor.name in stored:
        raise CheckpointError(f"{path}: tensor {tensor.name} is also in {stored[tensor.name].path.name}")
      stored[tensor.name] = tensor
  absent = [name for name, shard in weight_map.items() if name not in stored or stored[name].path.name != shard]
  if absent:
    raise CheckpointError(
      f"{directory / kind.index}: {len(absent)} tensors are not in the shard that the index names "
      f"({some(absent)}); download the checkpoint again"
    )
  return stored


def _format(directory: pathlib.Path, allow_pickle: bool) -> Format:
  found = {kind: _found(directory, kind) for kind in (SAFETENSORS, PICKLED)}
  if found[SAFETENSORS]:
    return SAFETENSORS
  if allow_pickle and found[PICKLED]:
    return PICKLED
  if allow_pickle:
    raise CheckpointError(f"{directory}: no weights, neither {SAFETENSORS.files} nor {PICKLED.files}")
  what = f"only pickled weights ({some(found[PICKLED])})" if found[PICKLED] else "no safetensors"
  raise CheckpointError(
    f"{directory}: {what}; pickled weights ({PICKLED.files}) could hold code and are read with --allow_pickle only, "
    f"which takes their tensors and runs nothing; it needs PyTorch: {pickle_reader.EXTRA}"
  )


def _found(directory: pathlib.Path, kind: Format) -> list[str]:
  """Names of the index and of the weight files of a format, as far as they are there."""
  index = [kind.index] if (directory / kind.index).is_file() else []
  return index + [path.name for path in _files(directory, kind)]


def _files(directory: pathlib.Path, kind: Format) -> list[pathlib.Path]:
  paths = sorted(directory.glob(kind.files))
  return [path for path in paths if not any(path.match(pattern) for pattern in TRAINING_FILES)]


def _shards(directory: pathlib.Path, kind: Format, weight_map: dict[str, str]) -> list[pathlib.Path]:
  if weight_map:
    shards = [directory / name for name in sorted(set(weight_map.values()))]
    missing = [path.name for path in shards if not path.is_file()]
    if missing:
      raise CheckpointError(
        f"{directory}: {len(missing)} of {len(shards)} shards are missing ({some(missing)}); download them again"
      )
    return shards
  if (directory / kind.single).is_file():
    return [directory / kind.single]
  return _files(directory, kind)


def _read_index(path: pathlib.Path) -> dict[str, str]:
  if not path.is_file():
    return {}
  try:
    weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    if weight_map and all(pathlib.PurePath(shard).name == shard for shard in weight_map.values()):
      return weight_map
  except (ValueError, KeyError, TypeError, AttributeError):
    pass
  raise CheckpointError(f"{path}: not an index of shards; download it again")


def _read_header(path: pathlib.Path, kind: Format) -> list[StoredTensor]:
  try:
    with open(path, "rb") as file:
      is_pointer = file.read(8) == b"version "
    if is_pointer:
      raise CheckpointError(f"{path}: a Git LFS pointer, not the weights; fetch them with `git lfs pull`")
    return kind.read_header(path)
  except OSError as error:
    raise CheckpointError(f"{path}: cannot be read ({first_line(error)})") from error
