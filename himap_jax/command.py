"""What the commands share: values of flags, the persistent compilation cache, messages and exit statuses."""

import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags, logging

from checkpoints_convert.source import read_json, write_json
from himap_jax import checkpoint

DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}


def numbers(flag: Any, parse: Callable[[str], Any], like: str = "of numbers") -> tuple | None:
  """The parsed values of a list flag; None where it has none.

  Raises:
    ValueError: a value that cannot be parsed.
  """
  if flag.value is None:
    return None
  try:
    return tuple(parse(text.strip()) for text in flag.value)
  except ValueError as error:
    raise ValueError(f"--{flag.name}={','.join(flag.value)}: not a list {like}") from error


def keep_count(text: str) -> int | float:
  """How many image tokens to keep: `72`, or `12.5%` as a fraction."""
  return float(text[:-1]) / 100 if text.endswith("%") else int(text)


def keep_counts(text: str) -> tuple[int | float, ...]:
  """How many image tokens to keep at each stage: `288/72`, or shares."""
  return tuple(map(keep_count, text.split("/")))


def ladder(flag: Any) -> tuple[tuple[int | float, ...], ...]:
  """The keep counts of every rung of a list flag.

  Raises:
    ValueError: a value that cannot be parsed.
  """
  return numbers(flag, keep_counts, "such as 144/36,288/72")


def compilation_cache_dir(given: str | None) -> str:
  """The directory of JAX's persistent cache: the given one (none when empty), or the user's."""
  return str(checkpoint.default_cache_dir() / "compiled") if given is None else given


def use_compilation_cache(directory: str) -> None:
  """Has JAX keep compiled programs in a directory, unless it is empty."""
  if directory:
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def hold_to_settings(path: pathlib.Path, settings: Mapping[str, Any], advice: str) -> None:
  """Writes what the results beside a file depend on or, where the file is there, compares it.

  Raises:
    ValueError: the results were begun with other settings; the message ends with the advice.
  """
  settings = json.loads(json.dumps(settings))  # as they are read: lists for tuples
  if not path.exists():
    write_json(path, settings)
    return
  before = read_json(path)
  changed = [
    f"{name} was {before.get(name)!r}, now {settings.get(name)!r}"
    for name in sorted(before.keys() | settings.keys())
    if before.get(name) != settings.get(name)
  ]
  if changed:
    raise ValueError(f"{path}: begun with other settings ({'; '.join(changed)}); {advice}")


def execute(name: str, argv: Sequence[str], action: Callable[[], int], *, resumes: bool = True) -> None:
  """Runs a command and exits with its status; what it raises for the user becomes one line.

  Args:
    name: of the command, for messages.
    argv: what is left of the command line beside flags.
    action: what to do; returns the status.
    resumes: whether the same command goes on where an interrupted one stopped.
  """
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)
  try:
    if len(argv) > 1:
      raise ValueError(f"unexpected argument {argv[1]!r}: every setting is a --flag=value")
    sys.exit(action())
  except (ValueError, RuntimeError, OSError) as error:
    print(f"{name}: {error}", file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt:
    print(f"\n{name}: interrupted{'; the same command goes on from here' if resumes else ''}", file=sys.stderr)
    sys.exit(130)
