"""The paper's tables (arXiv 2503.13108): its numbers beside ours, as far as somebody has run them.

    python -m experiments.evaluate.paper

reads the results of `experiments.evaluate --flagfile=experiments/flags/paper_table_1.flags` and its like, where they were
run, and prints every table.
"""

import csv
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import app, flags

from experiments.shared import tabular

FLAG_FILES = pathlib.Path(__file__).parents[1] / "flags"


class PaperTable(NamedTuple):
  """One table of the paper.

  Attributes:
    reported: the paper's numbers by task and setting. They come from a summary of the paper, which gives only some.
  """

  title: str
  reported: Mapping[tuple[str, str], float] = {}


_HIMAP = "himap@2/8:50%/12.5%"
TABLES = {
  "1": PaperTable(
    "Table 1, questions, LLaVA-1.5-7B",
    {
      ("vqav2_testdev", "none"): 78.3,
      ("vqav2_testdev", _HIMAP): 78.6,
      ("textvqa_ocr", "none"): 58.2,
      ("textvqa_ocr", _HIMAP): 58.4,
      ("mme", "none"): 1749.9,
      ("mme", _HIMAP): 1785.1,
      ("scienceqa_img", "none"): 67.9,
      ("scienceqa_img", _HIMAP): 68.3,
    },
  ),
  "1_13b": PaperTable(
    "Table 1, questions, LLaVA-1.5-13B", {("scienceqa_img", "none"): 71.6, ("scienceqa_img", "himap"): 72.1}
  ),
  "2": PaperTable("Table 2, captions, LLaVA-1.5-7B"),
  "3_internvl": PaperTable("Table 3, other models, InternVL-Chat-V1.0-7B"),
  "3_qwen_vl": PaperTable("Table 3, other models, Qwen-VL-Chat-7B"),
  "4": PaperTable("Table 4, what the stages rank by, LLaVA-1.5-7B", {("scienceqa_img", _HIMAP): 68.3}),
  "5": PaperTable("Table 5, charts and documents, LLaVA-1.5-7B"),
  "8": PaperTable("Table 8, K2 and R2 for captions, LLaVA-1.5-7B"),
  "9": PaperTable("Table 9, one stage alone and both, LLaVA-1.5-7B", {("scienceqa_img", _HIMAP): 68.3}),
}


def with_paper(rows: Sequence[tabular.Row], name: str) -> list[dict[str, Any]]:
  """Rows of an evaluation with the paper's number as `paper`, where it is known."""
  reported = TABLES[name].reported
  return [{**row, "paper": reported.get((row["task"], row["setting"]))} for row in rows]


def flags_of(name: str) -> dict[str, str]:
  """The flags of a table's flagfile."""
  lines = (FLAG_FILES / f"paper_table_{name}.flags").read_text(encoding="utf-8").splitlines()
  return dict(line.removeprefix("--").partition("=")[::2] for line in lines if line.startswith("--"))


def rows_of(name: str, results: pathlib.Path) -> list[dict[str, Any]]:
  """One row for every task and setting of a table's flagfile; those that were run have our score as `ours`."""
  given = flags_of(name)
  own: dict[tuple[str, str], dict[str, str]] = {}
  path = results / given["output"] / "evaluate.csv"
  if path.exists():
    with open(path, newline="", encoding="utf-8") as file:
      own = {(row["task"], row["setting"]): row for row in csv.DictReader(file)}
  rows = []
  for task in given["tasks"].split(","):
    for setting in given["settings"].split(","):
      row = own.get((task, setting))
      rows.append({"task": task, "setting": setting, "ours": _ours(row), "questions": row and row["questions"]})
  return with_paper(rows, name)


def _ours(row: Mapping[str, str] | None) -> str:
  if row is None:
    return "not run"
  if not row.get("score"):
    return "answers for the server"
  return "{:.1f} ({:.1f} to {:.1f})".format(*(float(row[f"score{end}"]) for end in ("", "_low", "_high")))


def page(results: pathlib.Path) -> list[str]:
  """The lines of all tables in Markdown."""
  lines = []
  columns = {
    "task": "{task}",
    "setting": "`{setting}`",
    "paper": "{paper:g}",
    "ours": "{ours}",
    "questions": "{questions}",
  }
  for name, table in TABLES.items():
    command = f"`--flagfile=experiments/flags/paper_table_{name}.flags`"
    lines += [f"## {table.title}", "", command, "", *tabular.formatted(rows_of(name, results), columns), ""]
  return lines


def main(argv: Sequence[str]) -> None:
  del argv
  print("\n".join(page(pathlib.Path(flags.FLAGS.results))))


if __name__ == "__main__":
  flags.DEFINE_string("results", ".", "Where the directories `paper_table_…_output` are.")
  app.run(main)
