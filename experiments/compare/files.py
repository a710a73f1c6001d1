"""The files of a comparison: tables, plots, and the report with pictures."""

import pathlib
from collections.abc import Sequence

from experiments.compare import plots, report, tables
from experiments.compare.comparison import BY_SIZE, BY_TYPE, Comparison, Pair
from experiments.shared import tabular


def write(
  directory: pathlib.Path,
  comparison: Comparison,
  examples: Sequence[report.Example],
  pairs: Sequence[Pair],
  *,
  title: str,
  seed: int,
  num_strips: int,
) -> str:
  """Writes all files; returns the table to print.

  Args:
    title: of the report.
    seed: of the bootstrap.
    num_strips: examples in strips.png.
  """
  rows = comparison.rows(seed=seed)
  columns, num_layers = tables.readable_columns(rows), comparison.sizes.model.num_layers
  texts = {
    "table.md": tables.markdown(rows, columns),
    "findings.md": tables.findings(rows),
    "types.md": tables.by_group(rows, BY_TYPE),
    **({"sizes.md": tables.by_group(rows, BY_SIZE)} if tables.groups_of(rows, BY_SIZE) else {}),
    **({"pairs.md": tables.pairs(comparison.pairs(pairs, seed=seed))} if pairs else {}),
    "report.html": report.render(columns, tables.readable_rows(rows), examples, title=title, num_layers=num_layers),
  }
  for name, text in texts.items():
    (directory / name).write_text(text, encoding="utf-8")
  tabular.write_csv(directory / "table.csv", rows)
  plots.plot_costs(directory / "flops.png", rows, plots.FLOPS)
  if any(row.get("prefill_time") for row in rows):
    plots.plot_costs(directory / "time.png", rows, plots.TIME)
  plots.plot_types(directory / "types.png", rows)
  if tables.groups_of(rows, BY_SIZE):
    plots.plot_sizes(directory / "sizes.png", rows)
  plots.draw_strips(directory / "strips.png", examples[:num_strips], report.cells_to_show(comparison.cells))
  printed = [report.Column("label", "", "text"), *(column for column in columns if column.name in tables.PRINTED)]
  return tables.markdown([row for row in rows if not row.get("note")], printed)
