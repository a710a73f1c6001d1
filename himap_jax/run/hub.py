"""Data sets on the Hugging Face hub: which files one has, and those of them that are needed."""

import contextlib
import pathlib
import types
from collections.abc import Iterator

from checkpoints_convert.messages import first_line
from himap_jax.errors import UserError

_TIMEOUT = 30  # seconds


def list_files(repository: str) -> list[str]:
  """The names of a data set's files; of those downloaded earlier if the hub cannot be reached."""
  huggingface_hub = _client()
  with _unreachable(repository):
    try:
      huggingface_hub.dataset_info(repository, timeout=_TIMEOUT)  # is not repeated as the next is for half a minute
      return huggingface_hub.list_repo_files(repository, repo_type="dataset")
    except Exception:
      with contextlib.suppress(Exception):
        directory = huggingface_hub.snapshot_download(repository, repo_type="dataset", local_files_only=True)
        return [path.relative_to(directory).as_posix() for path in pathlib.Path(directory).rglob("*") if path.is_file()]
      raise


def download(repository: str, name: str) -> pathlib.Path:
  """A file in the hub's cache, downloaded if it is not there."""
  huggingface_hub = _client()
  with _unreachable(repository):
    return pathlib.Path(huggingface_hub.hf_hub_download(repository, name, repo_type="dataset"))


def _client() -> types.ModuleType:
  """The hub's library, which does not print its attempts."""
  import huggingface_hub  # slow to import
  from huggingface_hub.utils import logging

  logging.set_verbosity_error()
  return huggingface_hub


@contextlib.contextmanager
def _unreachable(repository: str) -> Iterator[None]:
  try:
    yield
  except Exception as error:  # the client also raises errors of its HTTP library
    raise UserError(
      f"{repository}: no such file or directory, and it cannot be downloaded from the Hugging Face hub "
      f"({first_line(error)})"
    ) from error
