"""The file that says that a directory is a finished conversion."""

import pathlib
from typing import Any

from checkpoints_convert.source import read_json

MARKER = "himap_jax.json"
PARAMS = "params"
FORMAT = 1


def read_marker(directory: pathlib.Path) -> dict[str, Any] | None:
  """What a finished conversion says of itself, or None where there is none.

  Raises:
    ValueError: the directory was written in another format.
  """
  if not (directory / MARKER).is_file():
    return None
  marker = read_json(directory / MARKER)
  if marker.get("format") != FORMAT:
    raise ValueError(
      f"{directory}: converted in format {marker.get('format')!r}, this version reads {FORMAT}; "
      "convert the checkpoint again"
    )
  return marker
