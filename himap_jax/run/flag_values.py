"""The parsing of flag values."""

import pathlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

from himap_jax.engine.sharding import AXES
from himap_jax.errors import UserError


def numbers(flag: Any, parse: Callable[[str], Any], like: str = "of numbers") -> tuple | None:
  """Parses a list flag; None if it is not set. Raises UserError if a value cannot be parsed."""
  if flag.value is None:
    return None
  try:
    return tuple(parse(text.strip()) for text in flag.value)
  except ValueError as error:
    raise UserError(f"--{flag.name}={','.join(flag.value)}: not a list {like}") from error


def keep_count(text: str) -> int | float:
  """A number of image tokens from `72`, or a fraction from `12.5%`."""
  return float(text[:-1]) / 100 if text.endswith("%") else int(text)


def named_number(text: str) -> tuple[str, float]:
  """A name and its value, from `threshold:0.8`."""
  name, value = text.split(":")
  return name.strip(), float(value)


def buckets(flag: Any) -> tuple[int, ...]:
  """The padded lengths in a list flag; `UserError` if there are none or one cannot be parsed."""
  lengths = numbers(flag, int)
  if not lengths:
    raise UserError(f"--{flag.name} is empty; name lengths such as 64,128")
  return lengths


def chosen(flag: Any, known: Collection[str]) -> list[str]:
  """The names in a list flag; `UserError` if one is unknown."""
  for name in flag.value:
    if name not in known:
      raise UserError(f"--{flag.name}: {f'unknown {name!r}' if name else 'an empty name'}; known: {', '.join(known)}")
  return flag.value


def check_outside(flag: str, path: pathlib.Path, directory: pathlib.Path, what: str) -> None:
  """Raises `UserError` for a path inside a directory, to whose files a command must not add."""
  if path.resolve().is_relative_to(directory.resolve()):
    raise UserError(f"--{flag}={path} is in {what}; name another directory")


def parse_mesh(axes: Sequence[str]) -> dict[str, int]:
  """Sizes by mesh axis from `data:4`, `tensor:2`; raises `UserError` for invalid axes or sizes."""
  sizes: dict[str, int] = {}
  for text in axes:
    name, _, size = text.strip().partition(":")
    if name not in AXES or name in sizes or not size.isdecimal() or int(size) < 1:
      raise UserError(f"--mesh: {text!r} is not an axis and its size, as in data:4,tensor:2")
    sizes[name] = int(size)
  return sizes
