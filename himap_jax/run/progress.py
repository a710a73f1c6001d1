"""Progress of a command: a bar on a terminal, otherwise periodic lines."""

import contextlib
import sys
import threading
import time

from tqdm import tqdm


class Progress(contextlib.AbstractContextManager):
  """Counts and shows progress; a context manager.

  On a terminal it is tqdm's bar. Elsewhere it is a line on stderr every `interval` seconds: the count, the rate since the
  previous line with a rate, and the time left at that rate; or the time so far if nothing has been counted since.
  """

  def __init__(self, total: int, unit: str, label: str, *, shown: bool = True, interval: int | float = 30):
    """`unit` is singular, such as `row`; `label` begins the bar or line."""
    is_terminal = sys.stderr.isatty()
    self._bar = tqdm(total=total, unit=unit, desc=label, file=sys.stderr, disable=not (shown and is_terminal))
    self._total, self._unit, self._label = total, unit, label
    self._done = self._done_before = 0
    self._start = self._time_before = time.monotonic()
    self._ended = threading.Event()
    self._has_lines, self._interval = shown and not is_terminal, interval
    self._thread: threading.Thread | None = None

  def __enter__(self) -> "Progress":
    if self._has_lines:
      self._thread = threading.Thread(target=self._lines, daemon=True)
      self._thread.start()
    return self

  def __exit__(self, *exception: object) -> None:
    self._ended.set()
    if self._thread is not None:
      self._thread.join()  # no line comes after the end
    self._bar.close()

  def print(self, text: str) -> None:
    """Prints a line on stderr, above the bar if there is one."""
    tqdm.write(text, file=sys.stderr)

  def update(self, count: int = 1) -> None:
    self._bar.update(count)
    self._done += count

  def line(self) -> str:
    """The count, and the rate and the time left if it has grown since the previous line with these; or the time so far."""
    now, done = time.monotonic(), self._done
    counted, seconds = done - self._done_before, now - self._time_before
    text = f"{self._label}: {self._unit} {done} of {self._total}"
    if not counted:
      return f"{text} after {tqdm.format_interval(round(now - self._start))}"
    self._done_before, self._time_before = done, now
    rate = counted / seconds
    return f"{text}, {rate:.3g} {self._unit}/s, {tqdm.format_interval(round((self._total - done) / rate))} left"

  def _lines(self) -> None:
    while not self._ended.wait(self._interval):
      sys.stderr.write(f"{self.line()}\n")
      sys.stderr.flush()
