"""Files for the servers that score a split without public answers."""

import pathlib
from collections.abc import Sequence

from checkpoints_convert.json_files import write_json
from experiments.evaluate.tasks.task import Scored, Task
from himap_jax.errors import UserError
from himap_jax.run.user_errors import user_error


def write(task: Task, scored: Sequence[Scored], path: pathlib.Path) -> None:
  """Writes a task's answers in the form that its server reads; raises `UserError` if it has none or on a bad path."""
  if task.submission is None:
    raise UserError(f"{task.title} has no server that scores answers")
  with user_error(f"cannot write the submission {path}"):
    write_json(path, task.submission(scored))
