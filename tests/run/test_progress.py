"""The bar on a terminal, and the lines elsewhere."""

import io
import sys

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


def test_lines_at_most_every_interval(clock, use):
  file = use(io.StringIO())
  with Progress(200, "row", "himap_jax", interval=30) as bar:
    for _ in range(8):
      clock[0] += 10
      bar.update(5)
    assert file.getvalue().splitlines() == [
      "himap_jax: row 15 of 200, 0.5 row/s, 06:10 left",
      "himap_jax: row 30 of 200, 0.5 row/s, 05:40 left",
    ]
    clock[0] += 40
    bar.update(0)
    assert file.getvalue().splitlines()[2:] == ["himap_jax: row 40 of 200, 0.167 row/s, 16:00 left"]
    clock[0] += 60
    bar.update(0)  # nothing since the line before
  assert len(file.getvalue().splitlines()) == 3


def test_the_rate_is_that_since_the_line_before(clock, use):
  file = use(io.StringIO())
  with Progress(100, "cell", "compare", interval=30) as bar:
    clock[0] += 300  # compiling
    bar.update(10)
    clock[0] += 30
    bar.update(60)
  assert file.getvalue().splitlines() == [
    "compare: cell 10 of 100, 0.0333 cell/s, 45:00 left",
    "compare: cell 70 of 100, 2 cell/s, 00:15 left",
  ]


def test_short_commands_say_nothing(clock, use):
  file = use(io.StringIO())
  with Progress(2, "row", "himap_jax") as bar:
    clock[0] += 29
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
