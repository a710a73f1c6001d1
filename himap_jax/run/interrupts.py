"""Ctrl-C while a command imports its libraries, which takes seconds: it ends at once, without a traceback."""

import signal


def end_process() -> None:
  """An interrupt ends the process, unless it is ignored, until `raise_error`; a command's first call."""
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def raise_error() -> None:
  """An interrupt raises `KeyboardInterrupt` again, unless it is ignored."""
  if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
    signal.signal(signal.SIGINT, signal.default_int_handler)
