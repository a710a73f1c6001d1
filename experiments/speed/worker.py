"""A side in its own process, and the parent's handle to it."""

import contextlib
import multiprocessing
import os
import pathlib
import signal
import traceback
from multiprocessing.connection import Connection
from typing import Any

from experiments.speed import side

# Messages of XLA and PyTorch when memory runs out.
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory", "can't allocate memory")


class CannotRun(Exception):
  """A side cannot run a scenario; the message gives the reason."""


def _serve(connection: Connection) -> None:
  """Answers calls until the connection closes: `make` with the device, the side's methods with their results.

  An answer is an exception class, or None, and its message or the result.
  """
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the sides share an accelerator
  served = None
  with contextlib.suppress(EOFError):
    while True:
      method, arguments = connection.recv()
      try:
        if method == "make":
          served = side.make(*arguments)
        result = served.device if method == "make" else getattr(served, method)(*arguments)
        side.give_memory_back()
        connection.send((None, result))
      except NotImplementedError as error:
        connection.send((CannotRun, str(error)))
      except Exception as error:  # handled by the parent
        is_memory = isinstance(error, MemoryError) or any(sign in str(error) for sign in OUT_OF_MEMORY)
        connection.send((CannotRun, "out of memory") if is_memory else (RuntimeError, traceback.format_exc()))


class Worker:
  """Calls a side's methods in its process; a context manager that ends the process.

  A call may raise `CannotRun`, also if the process was killed (it is then restarted), or `RuntimeError` if it failed.
  """

  def __init__(self, name: str, geometry: dict[str, Any], weights: pathlib.Path):
    self._arguments = (name, geometry, weights)
    self._start()

  def _start(self) -> None:
    context = multiprocessing.get_context("spawn")
    self._connection, theirs = context.Pipe()
    self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
    self._process.start()
    theirs.close()
    self.device = self._exchange("make", self._arguments)

  def __enter__(self) -> "Worker":
    return self

  def __exit__(self, *_: object) -> None:
    self._connection.close()
    self._process.join(10)
    self._process.kill()
    self._process.join()

  def call(self, method: str, *arguments: Any) -> Any:
    try:
      return self._exchange(method, arguments)
    except (EOFError, ConnectionError) as error:
      self.__exit__()
      status = self._process.exitcode
      self._start()
      if status != -signal.SIGKILL:
        raise RuntimeError(f"the process of {self._arguments[0]} ended with status {status}") from error
      raise CannotRun("killed, most likely for lack of memory") from error

  def _exchange(self, method: str, arguments: tuple[Any, ...]) -> Any:
    self._connection.send((method, arguments))
    error, result = self._connection.recv()
    if error is not None:
      raise error(result)
    return result
