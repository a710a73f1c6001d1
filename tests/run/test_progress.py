"""The bar on a terminal, and the lines elsewhere."""

import io
import sys
import time

import pytest

from himap_jax.run import progress
from himap_jax.run.progress import Progress


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.fixture
def use(monkeypatch):
  """Puts a file in the place of stderr, and returns it."""

  def use(file):
    monkeypatch.setattr(sys, "stderr", file)
    return file

  return use


@pytest.fixture
def clock(monkeypatch):
  """A clock that the test sets."""
  now = [1000.0]
  monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
  return now


def test_a_line_has_the_rate_since_the_line_before(clock):
  bar = Progress(200, "row", "himap_jax")
  clock[0] += 30
  bar.update(15)
  assert bar.line() == "himap_jax: row 15 of 200, 0.5 row/s, 06:10 left"
  clock[0] += 60
  bar.update(5)
  bar.update(115)
  assert bar.line() == "himap_jax: row 135 of 200, 2 row/s, 00:32 left"


def test_a_line_without_anything_new_has_the_time_so_far(clock):
  bar = Progress(100, "cell", "compare")
  clock[0] += 30  # compiling
  assert bar.line() == "compare: cell 0 of 100 after 00:30"
  clock[0] += 270
  bar.update(10)
  assert bar.line() == "compare: cell 10 of 100, 0.0333 cell/s, 45:00 left"
  clock[0] += 30
  assert bar.line() == "compare: cell 10 of 100 after 05:30"


def test_lines_come_while_nothing_is_counted_and_end_with_it(use):
  file = use(io.StringIO())
  with Progress(3, "row", "himap_jax", interval=0.01):
    wait = time.monotonic() + 30
    while file.getvalue().count("\n") < 3 and time.monotonic() < wait:
      time.sleep(0.01)
  lines = file.getvalue()
  assert lines.count("himap_jax: row 0 of 3 after 00:0") >= 3
  time.sleep(0.05)
  assert file.getvalue() == lines


def test_short_commands_say_nothing(use):
  file = use(io.StringIO())
  with Progress(2, "row", "himap_jax") as bar:
    bar.update(2)
  assert file.getvalue() == ""


def test_a_bar_on_a_terminal(use):
  file = use(Terminal())
  with Progress(3, "row", "himap_jax", interval=0) as bar:
    bar.update(3)
  assert "himap_jax: 100%" in file.getvalue() and "3/3" in file.getvalue()
  assert " of " not in file.getvalue()


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_hidden(use, kind):
  file = use(kind())
  with Progress(3, "row", "himap_jax", shown=False, interval=0) as bar:
    bar.update(3)
  assert file.getvalue() == ""
