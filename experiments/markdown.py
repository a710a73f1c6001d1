"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
  """The lines of a table."""
  cells = (header, ["---"] * len(header), *rows)
  return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
