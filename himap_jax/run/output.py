"""The output of a run in all of its processes, the first of which writes it."""

import contextlib
import sys
from collections.abc import Collection

import numpy as np

from himap_jax.engine import processes
from himap_jax.errors import UserError
from himap_jax.run import table
from himap_jax.run.contract import Comparison, Contract
from himap_jax.run.writer import OutputWriter, Row


class Output(contextlib.AbstractContextManager):
  """The output of a run: a context manager in every process; the first process writes.

  Attributes:
    answered: for every prompt whether it has an answer; the same in every process.
  """

  def __init__(self, contract: Contract, *, resume: bool):
    """Opens the file and finds the answered prompts; see `OutputWriter`, and `TableWriter` for `.parquet`.

    Raises:
      UserError: in all processes, if the first cannot use the file or its rows were made with other settings, or if
        they differ in settings.
    """
    self.contract = contract
    self._writer, refusal = None, None
    has_row = np.zeros(len(contract.prompts), np.int32)
    with contextlib.ExitStack() as stack:
      if processes.is_leader():
        try:
          self._writer = stack.enter_context(_open_writer(contract, resume))
          has_row[:] = [key in self._writer.answered for key in contract.prompts.keys]
        except UserError as error:
          refusal = error
      if not processes.is_equal(contract.digest):
        raise UserError("the processes of this run have different flags or checkpoints; give all of them the same")
      *has_row, is_refused = processes.sum_over_processes(np.append(has_row, np.int32(refusal is not None)))
      if is_refused:
        raise refusal or UserError("the first process of this run cannot start; its own message says why")
      self._open = stack.pop_all()
    self.answered = np.array(has_row, bool)
    self._has_settings = False

  def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
    self._open.__exit__(kind, *exception)
    if kind is None:
      processes.sum_over_processes([0])  # all wait for the first, which may take longer than JAX waits at exit

  def write(self, rows: Collection[Row]) -> None:
    """Writes a batch of rows, the same in every process, and first the settings; errors as in `OutputWriter.write`."""
    if self._writer is not None and rows:
      if not self._has_settings:
        self.contract.write_settings()
        self._has_settings = True
      self._writer.write(rows)


def _open_writer(contract: Contract, resume: bool) -> OutputWriter:
  comparison, path = Comparison(contract), contract.output
  kind = table.TableWriter if path.suffix.lower() == table.SUFFIX else OutputWriter
  writer = kind(path, resume=resume, is_stale=comparison.is_failed)
  try:
    writer.forget(comparison.changed())
  except BaseException:
    writer.close()
    raise
  if comparison.num_unreadable:
    print(
      f"{comparison.num_unreadable} pictures of answered rows cannot be read; their answers are kept", file=sys.stderr
    )
  return writer
