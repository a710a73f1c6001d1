"""The files that say how a checkpoint was made, and the marker of a finished conversion among them."""

from typing import Any

from checkpoints_convert.errors import CheckpointError
from checkpoints_convert.json_files import read_json
from checkpoints_convert.source import AnyPath

MARKER = "himap_jax.json"
ASSEMBLED = "assembled.json"  # of the demo checkpoints
FORMAT = 1


def read_marker(directory: AnyPath) -> dict[str, Any] | None:
  """The marker of a finished conversion, or None; raises `CheckpointError` if it is in another format.

  `fingerprint` is the digest of the source checkpoint; `int8_weights` tells whether the decoder's weights are int8;
  `params` is the digest of the files of the parameters, None if these were written to object storage.
  """
  if not (directory / MARKER).is_file():
    return None
  advice = f"remove the folder {directory} and convert the checkpoint again"
  try:
    marker = read_json(directory / MARKER)
  except CheckpointError as error:
    raise CheckpointError(f"{error}; {advice}") from error
  if marker.get("format") != FORMAT:
    raise CheckpointError(
      f"{directory}: converted in format {marker.get('format')!r}, this version reads {FORMAT}; {advice}"
    )
  if not isinstance(marker.get("fingerprint"), str):
    raise CheckpointError(f"{directory / MARKER}: without the fingerprint of the source; {advice}")
  return marker
