"""An evaluation as tables, submissions and samples with their scores."""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Sequence

from checkpoints_convert.json_files import write_json
from experiments.evaluate.metrics.captions import APPROXIMATE
from experiments.evaluate.scores import Results
from experiments.evaluate.tasks.task import Sample, Scored, Task
from experiments.shared import kept, tabular
from himap_jax.run.user_errors import user_error

PREVIEWED = 10


def summary(rows: Sequence[tabular.Row], tasks: Iterable[Task]) -> list[str]:
  """A table of all rows, and the scores that models are known to reach."""
  columns = {name: f"{{{name}}}" for name in ("task", "setting", "questions")} | {
    "score": "{shown_score}",
    **({"paper": "{paper:g}"} if any("paper" in row for row in rows) else {}),
    **({"errors": "{errors}"} if any(row.get("errors") for row in rows) else {}),
    "to no pruning": "{shown_difference}",
    "same answers": "{agreement:.1%}",
    "prefill FLOPs": "{flops:.0%}",
    "seconds a row": "{seconds:.2f}",
  }
  known = [
    f"- {task.title}: {name} reaches {own.value:g} ({own.source})" for task in tasks for name, own in task.known.items()
  ]
  lines = [
    "Intervals are 95% bootstrap intervals over pictures; differences are paired. FLOPs are relative to no pruning."
  ]
  if any(f": {APPROXIMATE}" in name for row in rows for name in row):
    lines.append(
      "No Java was found (apt-get install default-jre-headless), which the tokenizer of captions needs: scores of captions "
      "are of a simpler one, and not comparable with published numbers."
    )
  rows = [
    {**row, "shown_score": _shown(row, "score", ".4g"), "shown_difference": _shown(row, "difference", "+.3g")}
    for row in rows
  ]
  return [*tabular.formatted(rows, columns), "", *lines, *([""] if known else []), *known]


def _shown(row: tabular.Row, name: str, form: str) -> str | None:
  """A value in its task's unit, with its interval if it has one."""
  if row.get(name) is None:
    return None
  return (tabular.with_interval(name, form) if f"{name}_low" in row else f"{{{name}:{form}}}").format_map(row)


def without_pictures(samples: Iterable[Sample]) -> list[Sample]:
  """Samples without their pictures, but for the first ones, which `preview` shows."""
  return [one if n < PREVIEWED else dataclasses.replace(one, images=()) for n, one in enumerate(samples)]


def preview(results: Results, label: str) -> str:
  """The first samples with question, picture, answer and score, so that a wrong prompt is seen early."""
  number = len(results.samples)
  lines = [f"{results.task.title}, {label}: the first {min(PREVIEWED, number)} of {number}"]
  for one in results.scored[label][:PREVIEWED]:
    pictures = ", ".join(
      str(image) if isinstance(image, pathlib.Path) else f"{len(image):,} bytes" for image in one.sample.images
    )
    right = " | ".join(dict.fromkeys(one.sample.references))
    score = "no references" if one.score is None else f"{one.score:g}"
    lines.append(f"  {one.sample.id} [{pictures}] {one.sample.question!r} → {one.answer!r} (right: {right}; {score})")
  return "\n".join(lines)


def write_samples(output: pathlib.Path, results: Results) -> None:
  """Writes a JSONL file of scored samples for every setting, and the submission where a server scores."""
  for label in results.answers:
    scored, stem = results.scored[label], f"{results.task.name}-{kept.file_name(label)}"
    with open(output / f"{stem}.jsonl", "w", encoding="utf-8") as file:
      for one in scored:
        row = {"id": one.sample.id, "question": one.sample.question, "references": one.sample.references}
        row |= {"answer": one.answer, "score": one.score, "category": one.sample.category}
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
    if results.task.submission is not None and all(one.score is None for one in scored):
      write_submission(results.task, scored, output / f"{stem}-submission.json")


def write_submission(task: Task, scored: Sequence[Scored], path: pathlib.Path) -> None:
  """Writes a task's answers in the form that its server reads; raises `UserError` if the file cannot be written."""
  with user_error(f"cannot write the submission {path}"):
    write_json(path, task.submission(scored))
