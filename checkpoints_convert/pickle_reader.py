"""Reads files that `torch.save` wrote: tensors alone, through a mapping of the file into memory.

PyTorch's restricted unpickler builds tensors and plain containers and refuses everything else, so no code in a file is
run. Only the last file is mapped, and what is read of it is copied one tensor, or a part of it, at a time.
"""

import functools
import pathlib
import pickle
import re
import zipfile
from typing import Any

import ml_dtypes
import numpy as np

from checkpoints_convert.errors import CheckpointError
from checkpoints_convert.messages import first_line
from checkpoints_convert.stored import Reader, StoredTensor

EXTRA = "pip install 'himap_jax[pickled]'"

# PyTorch's names of dtypes → those of safetensors.
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64", "int32": "I32", "int64": "I64"}


def read_header(path: pathlib.Path) -> list[StoredTensor]:
  """The tensors of a file in their order in it; none is read.

  Raises `CheckpointError` without PyTorch, and if the file is incomplete, asks for more than tensors, or is in the
  format before PyTorch 1.6, which cannot be mapped.
  """
  tensors = _tensors(path).items()
  return [StoredTensor(name, path, _dtype(tensor), tuple(tensor.shape), _open) for name, tensor in tensors]


def _open(path: pathlib.Path, name: str) -> Reader:
  array = _array(_tensors(path)[name])
  return lambda index: np.array(array[index], order="C")  # a copy, as JAX may keep an array's own memory


def _array(tensor: Any) -> np.ndarray:
  """The tensor's memory as an array."""
  import torch

  is_bfloat16 = tensor.dtype == torch.bfloat16  # which NumPy lacks
  return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if is_bfloat16 else tensor.numpy()


def _dtype(tensor: Any) -> str:
  import torch

  if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_neg():
    return "not a plain array"
  name = str(tensor.dtype).removeprefix("torch.")
  return _DTYPES.get(name, name.upper())


def _tensors(path: pathlib.Path) -> dict[str, Any]:
  stat = path.stat()
  return _map(path, (stat.st_size, stat.st_mtime_ns, stat.st_ino))


@functools.lru_cache(maxsize=1)
def _map(path: pathlib.Path, state: tuple[int, int, int]) -> dict[str, Any]:
  """The tensors of a file by name, in mapped memory; `state` tells the file from a later one in its place."""
  try:
    import torch
  except ImportError as error:
    raise CheckpointError(f"{path}: pickled weights need PyTorch, in the extra `pickled`: {EXTRA}") from error
  _check_archive(path, num_bytes=state[0])
  try:
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
  except pickle.UnpicklingError as error:
    wanted = re.search(r"GLOBAL (\S+)", str(error))
    what = wanted[1] if wanted else "more than tensors"
    raise CheckpointError(f"{path}: refused, as its pickle asks for {what}; only tensors are read, no code") from error
  except Exception as error:  # damage inside a pickle shows in any way
    raise CheckpointError(f"{path}: not a readable file of torch.save ({first_line(error)})") from error
  items = content.items() if isinstance(content, dict) else ()
  tensors = {name: value for name, value in items if isinstance(name, str) and isinstance(value, torch.Tensor)}
  return {name: tensor.detach() for name, tensor in tensors.items()}


def _check_archive(path: pathlib.Path, *, num_bytes: int) -> None:
  """Raises `CheckpointError` if a file is no complete, uncompressed archive, as its mapping would need."""
  with open(path, "rb") as file:
    first = file.read(2)
  if first[:1] == pickle.PROTO:
    raise CheckpointError(
      f"{path}: in PyTorch's format before 1.6, which cannot be mapped into memory; save it again with a later PyTorch: "
      "`torch.save(torch.load(FILE, weights_only=True), FILE)`"
    )
  try:
    with zipfile.ZipFile(path) as archive:
      is_compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
  except zipfile.BadZipFile as error:
    reason = "truncated" if first == b"PK" else "it has no archive"
    raise CheckpointError(
      f"{path}: not a complete file of torch.save ({reason}; it has {num_bytes} bytes); download it again"
    ) from error
  if is_compressed:
    raise CheckpointError(f"{path}: a compressed archive, which cannot be mapped into memory; download the original")
