"""A side in a process of its own, and the handle that its parent holds."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import traceback
from multiprocessing.connection import Connection
from typing import Any

from experiments.speed import side

# What XLA and PyTorch say where memory does not suffice.
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory", "can't allocate memory")


class CannotRun(Exception):
  """A side that cannot run a scenario; the message says why."""


def _serve(connection: Connection, *arguments: Any) -> None:
  """Makes a side at the first call of a method, and answers calls until the connection closes."""
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the sides share an accelerator
  served = None
  with contextlib.suppress(EOFError):
    while True:
      method, values = connection.recv()
      try:
        served = served or side.make(*arguments)
        answer = "result", getattr(served, method)(*values)
      except NotImplementedError as error:
        answer = "cannot", str(error)
      except Exception as error:  # the parent decides what becomes of it
        is_short = isinstance(error, MemoryError) or any(sign in str(error) for sign in OUT_OF_MEMORY)
        answer = ("cannot", "out of memory") if is_short else ("failed", traceback.format_exc())
      ctypes.CDLL("libc.so.6").malloc_trim(0)  # the sides share the machine's memory
      connection.send(answer)


class Worker:
  """Calls a side's methods in its process, which the first call begins; a context manager that ends it."""

  def __init__(self, *arguments: Any):
    """`arguments` are those of `side.make`."""
    self._arguments = arguments
    self._process = None

  def __enter__(self) -> "Worker":
    return self

  def __exit__(self, *_: object) -> None:
    if self._process is not None:
      self._end()

  def call(self, method: str, *values: Any) -> Any:
    """The result of a method of `side.Side`.

    Raises:
      CannotRun: the side cannot run the scenario, or its process was killed; the next call begins it anew.
      RuntimeError: it failed.
    """
    if self._process is None:
      self._start()
    try:
      self._connection.send((method, values))
      kind, result = self._connection.recv()
    except (EOFError, ConnectionError) as error:
      status = self._end()
      if status == -signal.SIGKILL:
        raise CannotRun("killed, most likely for its memory") from error
      raise RuntimeError(f"the process of {self._arguments[0]} ended with status {status}") from error
    if kind == "result":
      return result
    raise (CannotRun if kind == "cannot" else RuntimeError)(result)

  def _start(self) -> None:
    context = multiprocessing.get_context("spawn")
    self._connection, theirs = context.Pipe()
    self._process = context.Process(target=_serve, args=(theirs, *self._arguments), daemon=True)
    self._process.start()
    theirs.close()

  def _end(self) -> int:
    """Ends the process and returns its status."""
    self._connection.close()
    self._process.join(10)
    self._process.kill()
    self._process.join()
    process, self._process = self._process, None
    return process.exitcode
