"""The start of a command: what precedes the import of its libraries, which takes seconds."""

import os
import signal


def begin() -> None:
  """A command's first call, before its other imports.

  An interrupt ends the process at once and without a traceback, unless it is ignored, until `raise_interrupts`.
  """
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
  os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before transformers is imported anywhere


def raise_interrupts() -> None:
  """An interrupt raises `KeyboardInterrupt` again, unless it is ignored."""
  if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
    signal.signal(signal.SIGINT, signal.default_int_handler)
