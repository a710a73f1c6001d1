"""Commands in processes of their own, forked from a server that has imported the slow libraries and run nothing yet."""

import atexit
import functools
import gc
import importlib.machinery
import itertools
import multiprocessing
import os
import pathlib
import runpy
import signal
import sys
import tempfile
import time
from multiprocessing import forkserver
from unittest import mock

ROOT = pathlib.Path(__file__).parent.parent
WITHOUT_TORCH = str(pathlib.Path(__file__).parent / "without_torch")
IMPORTED = ("himap_jax.run.answering", "matplotlib.pyplot", "transformers.models.auto.processing_auto")


class Command:
  """A running `python -m module`, or Python code that stands for `-c`.

  Attributes:
    process: its process; `exitcode` is −signal if one ended it.
  """

  _numbers = itertools.count()

  def __init__(self, module, *arguments, **environment):
    """Starts a module, or code of several lines, in the root of the project, with additions to the environment."""
    stem = _directory() / str(next(self._numbers))
    self._printed = stem.with_suffix(".out"), stem.with_suffix(".err")
    given = (module, list(map(str, arguments)), os.environ | environment, self._printed)
    self.process = _server().Process(target=_run, args=given)
    self.process.start()

  def text(self):
    """What it has printed so far: standard output and standard error."""
    return tuple(path.read_text() if path.exists() else "" for path in self._printed)

  def has_begun(self):
    """Whether it runs in its process, where signals have their effect."""
    return self._printed[1].exists()

  def succeeded(self):
    """Waits for its end and returns what it printed on standard output."""
    printed, errors = self.communicate()
    assert self.process.exitcode == 0, errors
    return printed

  def killed_after(self, text, *, count=1, seconds=0.0):
    """Kills it so many seconds after it has printed a text so often; returns whether it was still running."""
    self.wait_until(lambda: self.text()[0].count(text) >= count)
    time.sleep(seconds)
    self.process.kill()
    self.process.join()
    return self.process.exitcode == -signal.SIGKILL

  def communicate(self, timeout=600):
    """Waits for its end and returns its `text`."""
    self.process.join(timeout)
    assert self.process.exitcode is not None, self.text()
    return self.text()

  def wait_until(self, condition, *, seconds=300):
    """Waits for a condition that holds before the command ends."""
    deadline = time.monotonic() + seconds
    while not condition():
      assert self.process.is_alive() and time.monotonic() < deadline, self.text()
      time.sleep(0.001)

  def interrupt(self):
    os.kill(self.process.pid, signal.SIGINT)


def allow_torch():
  """Lets this process import torch, which `without_torch` keeps from commands."""
  for place, finder in enumerate(sys.meta_path):
    if getattr(finder, "__name__", "") == "WithoutTorch":
      sys.meta_path[place] = importlib.machinery.PathFinder


@functools.cache
def _directory():
  return pathlib.Path(tempfile.mkdtemp(prefix="commands"))


@functools.cache
def _server():
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload(list(IMPORTED))
  with mock.patch.dict(os.environ, PYTHONPATH=WITHOUT_TORCH):  # whatever the test has set that starts it
    forkserver.ensure_running()
  return context


def _run(module, arguments, environment, printed):
  gc.freeze()
  os.chdir(ROOT)
  os.environ.clear()
  os.environ.update(environment)
  signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
  for number, path in enumerate(printed, start=1):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
  is_code = "\n" in module
  sys.argv = ["-c" if is_code else module, *arguments]
  try:
    if is_code:
      exec(compile(module, "<code>", "exec"), {"__name__": "__main__"})
    else:
      runpy.run_module(module, run_name="__main__", alter_sys=True)
  finally:
    atexit._run_exitfuncs()  # multiprocessing would leave without them
