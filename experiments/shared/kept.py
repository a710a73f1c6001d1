"""Results cached in files and written atomically, so that a study can resume."""

import json
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from checkpoints_convert.json_files import write_json


def json_of(path: pathlib.Path, make: Callable[..., Any], *arguments: Any) -> Any:
  """The content of a JSON file; a missing file is written with `make(*arguments)` first."""
  if not path.exists():
    write_json(path, make(*arguments))
  return json.loads(path.read_text(encoding="utf-8"))


def arrays_of(path: pathlib.Path, make: Callable[..., Mapping[str, np.ndarray]], *arguments: Any) -> dict[str, Any]:
  """The arrays of an npz file; a missing file is written with `make(*arguments)` first."""
  if not path.exists():
    unfinished = path.with_suffix(".tmp.npz")
    np.savez(unfinished, **make(*arguments))
    unfinished.replace(path)
  with np.load(path) as file:
    return dict(file)


def file_name(label: str) -> str:
  """A label as a file name."""
  return re.sub(r"[^-+@%.=0-9a-z]", "-", label.replace(":", "="))
