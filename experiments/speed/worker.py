"""A side in a process of its own, and the handle that its parent holds."""

import multiprocessing
import os
import pathlib
import signal
import traceback
from multiprocessing.connection import Connection
from typing import Any

from experiments.speed import side

# What XLA and PyTorch say where memory does not suffice.
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory", "can't allocate memory")


class CannotRun(Exception):
  """A side that cannot run a scenario; the message says why."""


def _serve(connection: Connection, name: str, geometry: dict[str, Any], weights: pathlib.Path) -> None:
  """Answers calls of methods of a side until the connection closes."""
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the sides share an accelerator
  served = None

  def make() -> str:
    nonlocal served
    served = side.make(name, geometry, weights)
    return served.device

  call, arguments = make, ()
  while True:
    try:
      result = call(*arguments)
      side.give_memory_back()
      connection.send(("result", result))
    except NotImplementedError as error:
      connection.send(("cannot", str(error)))
    except Exception as error:  # the parent decides what becomes of it
      text = str(error)
      short = isinstance(error, MemoryError) or any(sign in text for sign in OUT_OF_MEMORY)
      connection.send(("cannot", "out of memory") if short else ("failed", traceback.format_exc()))
    try:
      method, arguments = connection.recv()
    except EOFError:
      return
    call = getattr(served, method)


class Worker:
  """Calls a side's methods in its process; a context manager that ends the process.

  Every call may raise `CannotRun`, also where the process was killed (it is begun anew), and `RuntimeError` where it failed.

  Attributes:
    device: what the side runs on.
  """

  def __init__(self, name: str, geometry: dict[str, Any], weights: pathlib.Path):
    self._arguments = (name, geometry, weights)
    self._start()

  def _start(self) -> None:
    """Begins the process and waits until its model is there."""
    context = multiprocessing.get_context("spawn")
    self._connection, theirs = context.Pipe()
    self._process = context.Process(target=_serve, args=(theirs, *self._arguments), daemon=True)
    self._process.start()
    theirs.close()
    self.device = self._receive()

  def __enter__(self) -> "Worker":
    return self

  def __exit__(self, *_: object) -> None:
    self._end()

  def _end(self) -> None:
    self._connection.close()
    self._process.join(10)
    self._process.kill()
    self._process.join()

  def call(self, method: str, *arguments: Any) -> Any:
    """The result of a method of `side.Side`."""
    try:
      self._connection.send((method, arguments))
      return self._receive()
    except (EOFError, ConnectionError) as error:
      self._end()
      status = self._process.exitcode
      self._start()
      if status != -signal.SIGKILL:
        raise RuntimeError(f"the process of {self._arguments[0]} ended with status {status}") from error
      raise CannotRun("killed, most likely for its memory") from error

  def _receive(self) -> Any:
    kind, result = self._connection.recv()
    if kind == "cannot":
      raise CannotRun(result)
    if kind == "failed":
      raise RuntimeError(result)
    return result
