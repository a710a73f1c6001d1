"""Errors that the user can mend."""


class CheckpointError(ValueError):
  """A checkpoint that cannot be found, read or written; the message says what is wrong and what to do."""
