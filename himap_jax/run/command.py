"""Common parts of the commands: compilation cache, settings of results, messages, exit statuses."""

import contextlib
import json
import os
import pathlib
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import app, flags, logging
from jax.experimental.compilation_cache import compilation_cache

from checkpoints_convert.errors import CheckpointError
from checkpoints_convert.json_files import read_json, write_json
from himap_jax import checkpoint
from himap_jax.engine import processes
from himap_jax.errors import UserError
from himap_jax.run import flag_help, startup
from himap_jax.run.user_errors import user_error


def compilation_cache_dir(given: str | None) -> str:
  """The directory of JAX's persistent cache: the given one (empty for none), or the user's."""
  return str(checkpoint.default_cache_dir() / "compiled") if given is None else given


def use_compilation_cache(directory: str) -> None:
  """Makes JAX keep compiled programs in a directory, or nowhere if it is empty."""
  if directory != (jax.config.jax_compilation_cache_dir or ""):
    compilation_cache.reset_cache()  # JAX goes on with the first directory otherwise
  jax.config.update("jax_compilation_cache_dir", directory or None)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
  """Describes the differences between two settings; empty if there are none."""
  before, now = (json.loads(json.dumps(dict(settings))) for settings in (before, now))  # lists for tuples
  texts = [  # in which a count of 1 is not 100%
    {name: json.dumps(value, sort_keys=True) for name, value in settings.items() if value is not None}
    for settings in (before, now)
  ]
  names = sorted({name for name, _ in texts[0].items() ^ texts[1].items()})
  return "; ".join(f"{name} was {before.get(name)!r}, now {now.get(name)!r}" for name in names)


def check_settings(path: pathlib.Path, settings: Mapping[str, Any], advice: str) -> None:
  """Writes the settings of results to a file or, if it exists, compares them with its contents.

  Raises:
    UserError: the settings differ (the message names them, then gives the advice), or the file cannot be written.
  """
  if path.exists():
    changed = differences(read_json(path), settings)
    if changed:
      raise UserError(f"{path}: made with other settings ({changed}); {advice}")
  else:
    with user_error(f"cannot write {path}"):
      write_json(path, dict(settings))


def start(name: str, main: Callable[[Sequence[str]], None], needed: Sequence[str] = ()) -> None:
  """Parses the flags of a command, of which some are `needed`, and runs its `main`, which calls `execute`.

  A wrong flag is one line and status 2; `--help` shows the flags by topic.
  """
  if sys.stdout is not None:  # as it is where it was closed
    sys.stdout.reconfigure(errors="backslashreplace")  # as stderr, so that no answer stops a run

  def parse(argv: list[str]) -> list[str]:
    if not {"--help", "--helpshort", "-h"}.isdisjoint(argv):
      print(flag_help.text(sys.modules["__main__"].__doc__ or name, flags.FLAGS, needed))
      sys.exit(0)
    try:
      others = flags.FLAGS(argv)
      flag_help.check_not_empty(flags.FLAGS, needed)
      return others
    except flags.Error as error:
      print(f"{name}: {flag_help.reason(error, list(flags.FLAGS))}", file=sys.stderr)
      sys.exit(2)

  app.run(main, flags_parser=parse)


def start_action(name: str, action: Callable[[], int], *, needed: Sequence[str] = (), resumes: bool = True) -> None:
  """As `start`, for a command that is an action and takes flags alone; arguments as of `start` and `execute`."""
  start(name, lambda argv: execute(name, argv, action, resumes=resumes), needed)


def execute(name: str, argv: Sequence[str], action: Callable[[], int], *, resumes: bool = True) -> None:
  """Runs a command and exits with its status.

  The status is what the action returns; 2 after an error that the user can fix, which is printed as one line; 130 after
  an interrupt, which the same command continues if it `resumes`; and 1 after any other exception, which is a bug and
  keeps its traceback.
  """
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)
  try:
    startup.raise_interrupts()
    if len(argv) > 1:
      raise UserError(f"unexpected argument {argv[1]!r}: every setting is a --flag=value")
    with _ignored_interrupts_sent_again():
      sys.exit(action())
  except (UserError, CheckpointError) as error:
    print(f"{name}: {error}", file=sys.stderr)
    processes.leave(2)
  except KeyboardInterrupt:
    print(f"\n{name}: interrupted{'; the same command continues from here' if resumes else ''}", file=sys.stderr)
    processes.leave(130)
  except Exception:
    traceback.print_exc()
    print(f"{name}: this is a bug; please report it with the lines above and the command line", file=sys.stderr)
    processes.leave(1)


@contextlib.contextmanager
def _ignored_interrupts_sent_again() -> Iterator[None]:
  """Sends an interrupt again that comes where Python ignores exceptions, such as in a callback of a weak reference."""
  before = sys.unraisablehook

  def hook(ignored: Any) -> None:
    if ignored.exc_type is KeyboardInterrupt:
      threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
      before(ignored)

  sys.unraisablehook = hook
  try:
    yield
  finally:
    sys.unraisablehook = before
