"""Reads safetensors files: the header first, then one tensor, or a part of it, at a time."""

import pathlib

from safetensors import SafetensorError, safe_open

from checkpoints_convert.errors import CheckpointError
from checkpoints_convert.messages import first_line
from checkpoints_convert.stored import Reader, StoredTensor

# Messages of the safetensors library about incomplete files → their meaning.
_DAMAGE = {
  "header too small": "it has no header",
  "header too large": "it has no header",
  "invalid header length": "truncated inside its header",
  "not fully covered": "truncated, or too long: its header describes another size",
}


def read_header(path: pathlib.Path) -> list[StoredTensor]:
  """The tensors of a file in their order on disk, none of them read; `CheckpointError` if it is truncated or corrupt."""
  try:
    with safe_open(path, "np") as file:
      slices = {name: file.get_slice(name) for name in file.offset_keys()}
      return [StoredTensor(name, path, one.get_dtype(), tuple(one.get_shape()), _open) for name, one in slices.items()]
  except SafetensorError as error:
    what = first_line(error).removeprefix("Error while deserializing header: ")
    reason = next((text for words, text in _DAMAGE.items() if words in what), f"unreadable header, {what}")
    raise CheckpointError(
      f"{path}: not a complete safetensors file ({reason}; it has {path.stat().st_size} bytes); download it again"
    ) from error


def _open(path: pathlib.Path, name: str) -> Reader:
  return safe_open(path, "np").get_slice(name).__getitem__
