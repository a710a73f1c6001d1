"""Errors that the user can fix."""


class CheckpointError(ValueError):
  """A checkpoint that cannot be found, read or written; the message states the problem and the remedy."""
