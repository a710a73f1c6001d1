"""Finds checkpoints on disk or on the Hugging Face Hub."""

import os
import pathlib
import re

from etils import epath

from checkpoints_convert.errors import CheckpointError
from checkpoints_convert.messages import first_line

TEMPLATES = "additional_chat_templates"  # folder of further chat templates
SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", f"{TEMPLATES}/*.jinja")
SAFETENSORS_FILES = "*.safetensors"
PICKLED_FILES = "*.bin"
TRAINING_FILES = ("optimizer*", "scheduler*", "sampler*", "training_args*")  # beside weights, with a training's state

PARAMS = "params"  # folder of a converted checkpoint's parameters
_INNER = (PARAMS, TEMPLATES)  # folders of which files are read, too

# A local path, or one in object storage.
AnyPath = pathlib.Path | epath.Path

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def locate(name: str, *, weights: bool = True, allow_pickle: bool = False) -> pathlib.Path:
  """The directory of a checkpoint, given by a directory or a Hub id; missing Hub files are downloaded.

  `weights` tells whether the weights are needed too, `allow_pickle` whether also pickled ones if there are no
  safetensors. Raises `CheckpointError` if there is no such checkpoint, it cannot be downloaded, or it holds links
  to files elsewhere, or what is no file.
  """
  path = pathlib.Path(os.path.expanduser(name))
  try:
    if path.is_dir():
      _check_files(path.resolve())
      return path.resolve()
    is_file = path.exists()
  except OSError as error:
    raise CheckpointError(f"{name}: {error.strerror}") from error
  if is_file or not HUB_ID.fullmatch(name):
    raise CheckpointError(f"{name}: neither a directory nor a Hugging Face id (owner/name)")
  import huggingface_hub  # slow to import, not needed for a local checkpoint

  patterns = [*SMALL_FILES, *([SAFETENSORS_FILES] if weights else ())]
  try:
    directory = pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    if weights and allow_pickle and not any(directory.glob(SAFETENSORS_FILES)):
      patterns, ignored = [*SMALL_FILES, PICKLED_FILES], [*TRAINING_FILES, "*/*"]
      directory = pathlib.Path(
        huggingface_hub.snapshot_download(name, allow_patterns=patterns, ignore_patterns=ignored)
      )
    return directory
  except Exception as error:  # the Hub client also raises errors of its HTTP library
    raise CheckpointError(
      f"{name}: no such directory, and it cannot be downloaded from the Hugging Face hub ({first_line(error)}); "
      "check the name and the connection, or download it elsewhere and name its directory"
    ) from error


def _check_files(directory: pathlib.Path) -> None:
  """Raises `CheckpointError` for a pipe or device, or a link to another folder, but not of the Hub's cache, made of links."""
  blobs = [directory.parent.parent / "blobs"] if directory.parent.name == "snapshots" else []
  for path in [*directory.iterdir(), *(path for name in _INNER for path in (directory / name).rglob("*"))]:
    target = pathlib.Path(os.path.realpath(path))
    if path.is_symlink() and not any(target.is_relative_to(own) for own in (directory, *blobs)):
      raise CheckpointError(f"{path}: a link to {target}, outside of the checkpoint; put the file itself there")
    if path.exists() and not (path.is_file() or path.is_dir()):
      raise CheckpointError(f"{path}: not a regular file")
