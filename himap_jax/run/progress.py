"""Progress of a command: a bar on a terminal, otherwise periodic lines."""

import contextlib
import math
import sys
import time

from tqdm import tqdm


class Progress(contextlib.AbstractContextManager):
  """Counts and shows progress; a context manager.

  On a terminal it is tqdm's bar. Elsewhere it is a line on stderr at most every `interval` seconds: the count, the rate
  since the previous line, and the time left at that rate.
  """

  def __init__(self, total: int, unit: str, label: str, *, shown: bool = True, interval: int | float = 30):
    """`unit` is singular, such as `row`; `label` begins the bar or line."""
    is_terminal = sys.stderr.isatty()
    self._bar = tqdm(total=total, unit=unit, desc=label, file=sys.stderr, disable=not (shown and is_terminal))
    self._total, self._unit, self._label = total, unit, label
    self._interval = math.inf if is_terminal or not shown else interval
    self._done = self._done_before = 0
    self._time_before = time.monotonic()

  def __exit__(self, *exception: object) -> None:
    self._bar.close()

  def print(self, text: str) -> None:
    """Prints a line on stderr, above the bar if there is one."""
    tqdm.write(text, file=sys.stderr)

  def update(self, count: int = 1) -> None:
    self._bar.update(count)
    self._done += count
    now = time.monotonic()
    if now - self._time_before >= self._interval and self._done > self._done_before:
      rate = (self._done - self._done_before) / (now - self._time_before)
      left = tqdm.format_interval(round((self._total - self._done) / rate))
      done = f"{self._unit} {self._done} of {self._total}, {rate:.3g} {self._unit}/s"
      print(f"{self._label}: {done}, {left} left", file=sys.stderr, flush=True)
      self._done_before, self._time_before = self._done, now
