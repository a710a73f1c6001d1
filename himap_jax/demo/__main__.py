"""Shows a page on which a picture and a question are answered without and with pruning, side by side.

    python -m himap_jax.demo --checkpoint=demo

The pruning flags say what the page starts with.
"""

from himap_jax.run import startup

startup.begin()

import contextlib
import dataclasses
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Sequence

from absl import flags

from himap_jax.errors import UserError
from himap_jax.pruning.config import PruningConfig
from himap_jax.run import command, model_flags, pruning_flags
from himap_jax.run.asking import Asker
from himap_jax.run.prompts import read_prompts
from himap_jax.run.records import open_records
from himap_jax.run.user_errors import user_error

flags.adopt_module_key_flags(model_flags)  # for --help
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to serve at; 0.0.0.0 lets other machines in.")
_PORT = flags.DEFINE_integer("port", 7860, "Port to serve at; 0 chooses a free one.", lower_bound=0, upper_bound=65535)
_EXAMPLES = flags.DEFINE_string(
  "examples",
  "experiments/demo",
  "Directory with pictures to start from, and a file prompts.jsonl that names them and asks about them. None if it is "
  "missing.",
)
_MAX_WAITING = flags.DEFINE_integer(
  "max_waiting", 8, "Most questions that wait for their answers; others are refused.", lower_bound=1
)
_MAX_PICTURE_MB = flags.DEFINE_integer("max_picture_mb", 16, "Largest file of a picture, in MB.", lower_bound=1)


def read_examples(directory: pathlib.Path) -> list[tuple[str, str]]:
  """The pictures, as files, and questions of a directory's prompts.jsonl; none if there is no such file."""
  path = directory / "prompts.jsonl"
  prompts = read_prompts(open_records(path)) if os.path.isfile(path) else ()
  return [
    (str(directory / str(prompt.images[0])), prompt.question)
    for prompt in prompts
    if prompt.error is None and len(prompt.images) == 1 and isinstance(prompt.question, str)
  ]


def with_default_method(asker: Asker) -> Asker:
  """The asker; without pruning if the model cannot run the default method."""
  try:
    asker.schedule(asker.config.pruning)
  except UserError:
    return dataclasses.replace(asker, config=dataclasses.replace(asker.config, pruning=PruningConfig("none")))
  return asker


def main(argv: Sequence[str]) -> None:
  """Runs the command and exits with its status."""

  def action() -> int:
    try:
      from himap_jax.demo.page import Limits, serve
    except ModuleNotFoundError as error:
      raise UserError(f"the page needs Gradio, in the extra `demo`: {error}") from error
    asker = Asker.open(model_flags.one_row_config())
    if not any(flags.FLAGS[name].present for name in (*pruning_flags.NAMES, "schedule")):
      asker = with_default_method(asker)
    limits = Limits(picture_bytes=_MAX_PICTURE_MB.value * 1_000_000, waiting=_MAX_WAITING.value)
    print(f"reading the weights of {asker.config.checkpoint} …", file=sys.stderr)
    asker.loaded  # noqa: B018
    address, examples = (_HOST.value, _PORT.value), read_examples(pathlib.Path(_EXAMPLES.value))
    with contextlib.ExitStack() as stack:
      with user_error(f"cannot serve at --host={_HOST.value} --port={_PORT.value}"):
        url = stack.enter_context(serve(address, asker, examples, limits))
      print(f"open {url} in a browser; Ctrl-C ends it", flush=True)
      signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what visitors sent is removed then, too
      try:
        threading.Event().wait()
      except KeyboardInterrupt:
        print(file=sys.stderr)
    return 0

  command.execute("himap_jax.demo", argv, action, resumes=False)


if __name__ == "__main__":
  command.start("himap_jax.demo", main)
