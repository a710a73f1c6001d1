"""A side in a process of its own, and the handle that its parent holds."""

import multiprocessing
import os
import pathlib
import time
from multiprocessing.connection import Connection
from typing import Any

from experiments.benchmark import side
from experiments.benchmark.scenarios import Scenario


def _serve(connection: Connection, name: str, geometry: dict[str, Any], weights: pathlib.Path) -> None:
  """Answers calls of methods of a side until the connection closes."""
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the sides share an accelerator
  served = side.make(name, geometry, weights)
  while True:
    try:
      method, arguments = connection.recv()
    except EOFError:
      return
    try:
      connection.send((True, getattr(served, method)(*arguments)))
    except (NotImplementedError, MemoryError, RuntimeError) as error:
      connection.send((False, str(error).partition("\n")[0] or type(error).__name__))


class Worker:
  """Calls a side's methods in its process; a context manager that ends the process."""

  def __init__(self, name: str, geometry: dict[str, Any], weights: pathlib.Path):
    self._arguments = (name, geometry, weights)
    self._start()

  def _start(self) -> None:
    context = multiprocessing.get_context("spawn")
    self._connection, theirs = context.Pipe()
    self._process = context.Process(target=_serve, args=(theirs, *self._arguments), daemon=True)
    self._process.start()
    theirs.close()

  def __enter__(self) -> "Worker":
    return self

  def __exit__(self, *_: object) -> None:
    self._end()

  def _end(self) -> None:
    self._connection.close()
    self._process.join(10)
    self._process.kill()

  def prepare(self, scenario: Scenario) -> float:
    """Prepares a scenario: compilation, and one run of everything; returns its seconds."""
    start = time.perf_counter()
    self._call("prepare", scenario)
    return time.perf_counter() - start

  def turn(self) -> dict[str, float]:
    """See `side.Side.turn`."""
    return self._call("turn")

  def accounting(self) -> dict[str, float]:
    """See `side.Side.accounting`."""
    return self._call("accounting")

  def peak_bytes(self) -> int:
    """See `side.Side.peak_bytes`."""
    return self._call("peak_bytes")

  def _call(self, method: str, *arguments: Any) -> Any:
    try:
      self._connection.send((method, arguments))
      done, result = self._connection.recv()
    except (EOFError, ConnectionError) as error:
      self._end()
      self._start()
      raise NotImplementedError("the process ended: most likely out of memory") from error
    if not done:
      raise NotImplementedError(result)
    return result
