"""Errors that the user can mend."""


class UserError(ValueError):
  """Something the user can mend; its message says what is wrong and what to do. Every other exception is a bug."""
