"""Errors that the user can fix."""


class UserError(ValueError):
  """An error that the user can fix; its message says what is wrong and what to do. Any other exception is a bug."""
