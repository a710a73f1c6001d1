"""JSON objects in files."""

import json
import os
import pathlib
import secrets
from typing import Any

from checkpoints_convert.errors import CheckpointError
from checkpoints_convert.messages import first_line
from checkpoints_convert.source import AnyPath


def write_json(path: pathlib.Path, content: Any) -> None:
  """Writes JSON, indented; atomic even if the process is killed."""
  unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
  try:
    with open(unfinished, "x", encoding="utf-8") as file:
      file.write(json.dumps(content, indent=2) + "\n")
      file.flush()
      os.fsync(file.fileno())
    os.replace(unfinished, path)
  except BaseException:
    unfinished.unlink(missing_ok=True)
    raise


def read_json(path: AnyPath) -> dict[str, Any]:
  """The object in a JSON file; raises `CheckpointError` if the file is missing or holds something else."""
  try:
    fields = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError) as error:
    reason = getattr(error, "strerror", None) or first_line(error)
    raise CheckpointError(f"{path}: cannot be read ({reason})") from error
  if not isinstance(fields, dict):
    raise CheckpointError(f"{path}: not a JSON object")
  return fields
