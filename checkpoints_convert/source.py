"""Finds checkpoints, on disk or on the Hugging Face hub, and tells one from another."""

import hashlib
import json
import pathlib
import re
from typing import Any

SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
WEIGHT_FILES = ("*.safetensors",)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def locate(name: str, *, weights: bool = True) -> pathlib.Path:
  """The directory of a checkpoint, downloaded if `name` is no directory but a hub id.

  Args:
    name: a directory or an id `owner/name`.
    weights: whether its weights are wanted, or only its small files.

  Raises:
    ValueError: there is no such checkpoint, or it cannot be downloaded.
  """
  path = pathlib.Path(name).expanduser()
  if path.is_dir():
    return path.resolve()
  if path.exists() or not _HUB_ID.fullmatch(name):
    raise ValueError(f"{name}: neither a directory nor a Hugging Face id (owner/name)")
  import huggingface_hub  # slow to import, and of no use to a local checkpoint

  patterns = [*SMALL_FILES, *(WEIGHT_FILES if weights else ())]
  try:
    return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
  except Exception as error:  # the hub's client raises those of its HTTP library too
    raise ValueError(
      f"{name}: no such directory, and it cannot be downloaded from the Hugging Face hub ({first_line(error)}); "
      "check the name and the connection, or download it elsewhere and name its directory"
    ) from error


def first_line(error: Exception) -> str:
  """The first line of an error's message, or its type where it has none."""
  return (str(error).strip() or type(error).__name__).splitlines()[0]


def write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
  """Writes an object, indented."""
  path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """The object in a JSON file.

  Raises:
    ValueError: it is missing, or holds something else.
  """
  try:
    fields = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise ValueError(f"{path}: cannot be read ({error})") from error
  if not isinstance(fields, dict):
    raise ValueError(f"{path}: not a JSON object")
  return fields


def fingerprint(*directories: pathlib.Path) -> str:
  """Digest of where checkpoints lie and of the names, sizes and modification times of their files."""
  digest = hashlib.sha256()
  for directory in directories:
    digest.update(f"{directory.resolve()}\n".encode())
    for path in sorted(path for pattern in (*SMALL_FILES, *WEIGHT_FILES) for path in directory.glob(pattern)):
      stat = path.stat()
      digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
  return digest.hexdigest()
