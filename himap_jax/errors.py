"""Errors that the user can fix."""

import numbers
from collections.abc import Collection
from typing import Any

NOT_FINITE = "the model's logits are not finite; if the dtype is bfloat16, try float32"


class UserError(ValueError):
  """An error that the user can fix; its message says what is wrong and what to do. Any other exception is a bug."""


def check_supported(found: Any, known: Collection[str], *, where: str, what: str) -> None:
  """Raises `UserError` unless `found` is in `known`; `where` and `what` say in the message what it is."""
  if found not in known:
    raise UserError(f"{where}: {what} {found!r} is not supported; supported: {', '.join(known)}")


def check_whole(name: str, value: Any, least: int = 1) -> None:
  """Raises `UserError` unless a value is a whole number of at least `least`."""
  if isinstance(value, bool) or not isinstance(value, numbers.Integral):
    raise UserError(f"{name} must be a whole number, but is {value!r}")
  if value < least:
    raise UserError(f"{name} must be at least {least}, but is {value}")


def check_is(name: str, value: Any, kinds: type | tuple[type, ...], what: str) -> None:
  """Raises `UserError` unless a value is of one of these types; `what` says in the message which."""
  if isinstance(value, bool) or not isinstance(value, kinds):
    raise UserError(f"{name} must be {what}, but is {value!r:.100}")


def check_bools(**values: Any) -> None:
  """Raises `UserError` unless all values are True or False."""
  for name, value in values.items():
    if not isinstance(value, bool):
      raise UserError(f"{name} must be True or False, but is {value!r:.100}")


def check_text(name: str, text: str, error: type[UserError] = UserError) -> None:
  """Raises `UserError`, or a kind of it, if a text holds an unpaired surrogate, as from bytes that are not UTF-8."""
  if any("\ud800" <= character <= "\udfff" for character in text):
    raise error(f"{name} has an unpaired surrogate, which is not text")
