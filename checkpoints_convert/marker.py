"""The file that says that a directory is a finished conversion."""

from typing import Any

from checkpoints_convert.errors import CheckpointError
from checkpoints_convert.source import AnyPath, read_json

MARKER = "himap_jax.json"
PARAMS = "params"
FORMAT = 1


def read_marker(directory: AnyPath) -> dict[str, Any] | None:
  """What a finished conversion says of itself, or None where there is none.

  Its `fingerprint` is the digest of the checkpoint that it was made from; `int8_weights` says whether the decoder's are int8.

  Raises:
    CheckpointError: the directory was written in another format.
  """
  if not (directory / MARKER).is_file():
    return None
  marker = read_json(directory / MARKER)
  if marker.get("format") != FORMAT:
    raise CheckpointError(
      f"{directory}: converted in format {marker.get('format')!r}, this version reads {FORMAT}; "
      "convert the checkpoint again"
    )
  return marker
