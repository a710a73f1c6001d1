"""Shows a page on which a picture and a question are answered without and with pruning, side by side.

    python -m himap_jax.demo --checkpoint=demo

The pruning flags say what the page starts with.
"""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before transformers is imported anywhere

import collections
import dataclasses
import mimetypes
import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags

from himap_jax.demo.server import ExamplePicture, Limits, Page
from himap_jax.run import command, model_flags, pruning_flags
from himap_jax.run.asking import Asker
from himap_jax.run.model_flags import AnswerConfig
from himap_jax.run.prompts import read_prompts
from himap_jax.run.records import open_records

flags.adopt_module_key_flags(model_flags)  # for --help
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to serve at; 0.0.0.0 lets other machines in.")
_PORT = flags.DEFINE_integer("port", 7860, "Port to serve at; 0 chooses a free one.", lower_bound=0, upper_bound=65535)
_EXAMPLES = flags.DEFINE_string(
  "examples",
  "experiments/demo",
  "Directory with pictures to start from, and a file prompts.jsonl that names them and asks about them. None if it is "
  "missing.",
)
_MAX_WAITING = flags.DEFINE_integer("max_waiting", 8, "Most visitors that wait for an answer.", lower_bound=0)
_MAX_PICTURE_MB = flags.DEFINE_integer("max_picture_mb", 16, "Largest file of a picture, in MB.", lower_bound=1)


def read_examples(directory: pathlib.Path) -> list[ExamplePicture]:
  """The pictures that a directory's prompts.jsonl asks about; none if there is no such file."""
  path = directory / "prompts.jsonl"
  questions: dict[str, list[str]] = collections.defaultdict(list)
  if path.is_file():
    for prompt in read_prompts(open_records(path)):
      if prompt.error is None and len(prompt.images) == 1 and isinstance(prompt.question, str):
        questions[str(prompt.images[0])].append(prompt.question)
  with command.user_error(f"--examples: cannot read the pictures of {path}"):
    return [
      ExamplePicture((directory / name).read_bytes(), mimetypes.guess_type(name)[0] or "image/png", tuple(asked))
      for name, asked in questions.items()
    ]


def main(argv: Sequence[str]) -> None:
  """Runs the command and exits with its status."""

  def action() -> int:
    values = model_flags.values_from_flags()
    one_row = dataclasses.replace(values["inputs"], batch_size=1)
    asker = Asker.open(AnswerConfig(**values | {"inputs": one_row}))
    if any(flags.FLAGS[name].present for name in (*pruning_flags.NAMES, "schedule")):
      asker.schedule(asker.config.pruning)  # else the page starts with a method that the model can run
    limits = Limits(picture_bytes=_MAX_PICTURE_MB.value * 1_000_000, waiting=_MAX_WAITING.value)
    address = (_HOST.value, _PORT.value)
    with command.user_error(f"cannot serve at --host={_HOST.value} --port={_PORT.value}"):
      page = Page(address, asker, read_examples(pathlib.Path(_EXAMPLES.value)), limits)
    with page:
      print(f"reading the weights of {asker.config.checkpoint} …", file=sys.stderr)
      asker.loaded  # noqa: B018
      print(f"open {page.url} in a browser; Ctrl-C ends it", flush=True)
      try:
        page.serve_forever()
      except KeyboardInterrupt:
        print(file=sys.stderr)
    return 0

  command.execute("himap_jax.demo", argv, action)


if __name__ == "__main__":
  app.run(main)
