"""Tables in Markdown and CSV."""

import csv
import pathlib
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.shared import statistics

Row = Mapping[str, Any]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
  cells = (header, ["---"] * len(header), *rows)
  return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]


def formatted(rows: Iterable[Row], columns: Mapping[str, str]) -> list[str]:
  """The lines of a Markdown table, from headings → formats such as `{accuracy:.1%}`; `–` where a value is missing."""
  fields = {form: [name for _, name, _, _ in string.Formatter().parse(form) if name] for form in columns.values()}

  def cell(row: Row, form: str) -> str:
    return "–" if any(row.get(name) is None for name in fields[form]) else form.format_map(row)

  return markdown(list(columns), ([cell(row, form) for form in columns.values()] for row in rows))


def with_interval(name: str, form: str, joined: str = "{} ({} to {})") -> str:
  """The format of a value and its interval, named as in `statistics.with_interval`."""
  return joined.format(*(f"{{{field}:{form}}}" for field in statistics.names(name)))


def write_csv(path: pathlib.Path, rows: Sequence[Row]) -> None:
  """Writes rows with all fields, in order of first appearance."""
  names = list(dict.fromkeys(name for row in rows for name in row))
  with open(path, "w", newline="", encoding="utf-8") as file:
    writer = csv.DictWriter(file, names)
    writer.writeheader()
    writer.writerows(rows)
