"""Inputs tried in a process of their own: each within a time, all within a memory."""

import collections
import contextlib
import importlib
import multiprocessing
import pathlib
import resource
import shutil
import signal
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

SECONDS = 20  # for one input
BYTES = 3 << 30  # of memory beyond what imported modules take; a picture at the limit of pixels takes 16 bytes for each
PRELOADED = ("himap_jax.run.job", "himap_jax.checkpoint", "hypothesis.strategies", "transformers")

# Tries as many inputs, which it writes to the directory, and counts their outcomes; raises if one breaks the promise.
Attempts = Callable[[np.random.Generator, pathlib.Path, int], "collections.Counter[str]"]


class Violation(BaseException):
  """An input broke a bound, such as `SECONDS`; no reader catches it."""


def each(inputs: Iterable[Any], attempt: Callable[[Any], str]) -> "collections.Counter[str]":
  """Counts the outcomes of inputs, each in bounded time."""
  return collections.Counter(in_time(attempt, one) for one in inputs)


def in_time(attempt: Callable[..., Any], *given: Any) -> Any:
  """The attempt's result; raises `Violation`."""
  signal.signal(signal.SIGALRM, _alarm)
  signal.alarm(SECONDS)
  try:
    return attempt(*given)
  finally:
    signal.alarm(0)


def trial(attempts: Attempts, count: int, kept: pathlib.Path) -> Callable[[np.random.Generator, pathlib.Path], Any]:
  """A trial of `count` inputs; what it has written is copied to `kept` if it fails."""

  def run(random: np.random.Generator, directory: pathlib.Path) -> dict[str, int]:
    receiver, sender = _context().Pipe(duplex=False)
    process = _context().Process(target=_run, args=(attempts, random, directory, count, sender))
    process.start()
    sender.close()
    try:
      found = receiver.recv() if receiver.poll(SECONDS * (count + 2)) else "it did not end"
    except EOFError:
      process.join()
      found = f"the process ended with {process.exitcode}"
    process.kill()
    process.join()
    if isinstance(found, str):
      with contextlib.suppress(shutil.Error):  # of pipes
        shutil.copytree(directory, kept / f"failed_{len(list(kept.glob('failed_*')))}", symlinks=True)
      raise AssertionError(found)
    return found

  return run


def _run(attempts: Attempts, random: np.random.Generator, directory: pathlib.Path, count: int, sender: Any) -> None:
  for name in PRELOADED:  # unless the server has done so
    importlib.import_module(name)
  mapped = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
  resource.setrlimit(resource.RLIMIT_AS, (mapped + BYTES, mapped + BYTES))
  try:
    sender.send(dict(attempts(random, directory, count)))
  except BaseException:
    sender.send(traceback.format_exc())


def _alarm(number: int, frame: Any) -> None:
  raise Violation(f"more than {SECONDS} s")


def _context() -> Any:
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload(list(PRELOADED))
  return context
