"""Tables in files."""

import csv
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
  """The lines of a table in Markdown."""
  cells = (header, ["---"] * len(header), *rows)
  return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]


def with_interval(row: Mapping[str, Any], name: str, form: str) -> str:
  """The text of a value and its interval, as `statistics.with_interval` names them."""
  return f"{row[name]:{form}} ({row[f'{name}_low']:{form}} to {row[f'{name}_high']:{form}})"


def write_csv(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
  """Writes rows with all their fields, in the order in which they first appear."""
  names = list(dict.fromkeys(name for row in rows for name in row))
  with open(path, "w", newline="", encoding="utf-8") as file:
    writer = csv.DictWriter(file, names)
    writer.writeheader()
    writer.writerows(rows)
