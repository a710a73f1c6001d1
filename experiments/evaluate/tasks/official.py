"""Reading of official files, for the tasks."""

import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from checkpoints_convert.messages import first_line
from himap_jax.errors import UserError


def read_json(path: pathlib.Path) -> Any:
  """Content of a JSON file; raises `UserError` if it cannot be read."""
  try:
    return json.loads(path.read_bytes())
  except (OSError, ValueError) as error:
    raise UserError(f"{path} cannot be read: {first_line(error)}") from error


def read_lines(path: pathlib.Path) -> Iterator[Any]:
  """Values of a file with a JSON object a line; raises `UserError` if it cannot be read."""
  try:
    with open(path, encoding="utf-8") as file:
      yield from (json.loads(line) for line in file if line.strip())
  except (OSError, ValueError) as error:
    raise UserError(f"{path} cannot be read: {first_line(error)}") from error


def find(directory: pathlib.Path, pattern: str, split: str) -> pathlib.Path:
  """The first file of a pattern whose name has the split's, and not `cn`, between marks; `UserError` if there is none."""
  parts = {path: re.split("[_.]", path.name.lower()) for path in sorted(directory.glob(pattern))}
  own = [path for path, names in parts.items() if split in names and "cn" not in names]
  if not own:
    raise UserError(f"{directory} has no {pattern} of the split {split}")
  return own[0]


def picture(directory: pathlib.Path, name: str, *folders: str) -> pathlib.Path:
  """A picture's file in the first of the folders, or the directory itself, that holds it; else where it was expected."""
  places = [directory / folder / name for folder in (*folders, "")]
  return next((place for place in places if place.is_file()), places[0])
