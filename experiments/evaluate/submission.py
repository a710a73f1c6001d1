"""Files for the servers that score a split without public answers."""

import json
import pathlib
from collections.abc import Sequence

from experiments.evaluate.tasks.task import Scored, Task
from himap_jax.errors import UserError


def write(task: Task, scored: Sequence[Scored], path: pathlib.Path) -> None:
  """Writes a task's answers in the form that its server reads; raises `UserError` if it has none or on a bad path."""
  if task.submission is None:
    raise UserError(f"{task.title} has no server that scores answers")
  try:
    path.write_text(json.dumps(task.submission(scored)), encoding="utf-8")
  except OSError as error:
    raise UserError(f"cannot write the submission {path}: {error.strerror}") from error
