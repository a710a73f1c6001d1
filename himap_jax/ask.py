"""Answers a question about pictures in the terminal.

    python -m himap_jax.ask picture.jpg "What is on the table?" --show=kept.png

The text appears as it is generated.
"""

from himap_jax.run import startup

startup.begin()

import os
import pathlib
import sys
from collections.abc import Callable, Sequence

from absl import flags
from PIL import Image

from himap_jax.errors import UserError, check_text
from himap_jax.run import command, model_flags
from himap_jax.run.asking import INCOMPLETE, Asker
from himap_jax.run.config import AnswerConfig
from himap_jax.run.drawing import draw_kept
from himap_jax.run.pictures import ImageError, PictureFiles
from himap_jax.run.sources import is_url
from himap_jax.run.user_errors import user_error

flags.adopt_module_key_flags(model_flags)  # for --help
_USAGE = 'python -m himap_jax.ask picture.jpg "What is it?"'
_SHOW = flags.DEFINE_string(
  "show", None, "The .png file to write: the pictures with the patches kept at each stage, by the rank of their scores."
)


def ask(config: AnswerConfig, images: Sequence[str], question: str, show: pathlib.Path | None = None) -> None:
  """Prints the answer, and on stderr what was kept and the time it took.

  Raises:
    UserError, CheckpointError: a picture or the checkpoint cannot be read, the question does not fit the model, or
      `show` cannot be written.
  """
  check_text("the question", question)
  if show is not None:
    _check_show(show, images)
  files = PictureFiles(allow_urls=config.allow_urls)
  pictures = [_load(files, image) for image in images]
  asker = Asker.open(config)
  asked = asker.prepare(pictures, question, config.pruning)
  answered = asker.answer(asked, _printing(asker.processor.decode)).answered
  print(flush=True)
  kept = "".join(
    f", {len(own)} from layer {stage.layer} on" for own, stage in zip(answered.kept, asked.schedule.stages, strict=True)
  )
  times = f"prefill {answered.prefill_seconds:.2f} s, {len(answered.tokens)} tokens {answered.decode_seconds:.2f} s"
  print(f"{config.pruning.label}: {asked.example.num_image_tokens} image tokens{kept}; {times}", file=sys.stderr)
  if show is not None:
    with user_error(f"--show: cannot write {show}"):
      draw_kept(asker.processor.views(asked.example), answered.kept, answered.ranks).save(show, format="PNG")


def _load(files: PictureFiles, image: str) -> Image.Image:
  """A picture; the error about one that is missing also says where the question belongs, which may be taken for one."""
  try:
    return files.load(image)[0]
  except ImageError as error:
    if os.path.exists(image) or is_url(image):
      raise
    raise UserError(f"{error}; the question is the last argument, in quotes: {_USAGE}") from error


def _check_show(show: pathlib.Path, images: Sequence[str]) -> None:
  """Raises `UserError` unless the file to write is a PNG in a directory that is there, and none of the pictures."""
  if not images:
    raise UserError("--show needs a picture")
  if os.path.isdir(show):
    raise UserError(f"--show={show} is a directory; name a file in it")
  if show.suffix.lower() != ".png":
    raise UserError(f"--show={show}: a PNG is written; name a file that ends in .png")
  if not os.path.isdir(show.parent):
    raise UserError(f"--show={show}: there is no directory {show.parent}; make it first, or name another file")
  if any(os.path.exists(show) and os.path.exists(image) and os.path.samefile(show, image) for image in images):
    raise UserError(f"--show={show} is a picture of the question, which it would overwrite; name another file")


def _printing(decode: Callable[[list[int]], str]) -> Callable[[Sequence[int]], bool]:
  """Prints the text of tokens as far as it is complete, and never ends the answer; as `Request.is_complete`."""
  printed = ""

  def is_complete(tokens: Sequence[int]) -> bool:
    nonlocal printed
    text = decode(list(tokens)).rstrip(INCOMPLETE)
    if text.startswith(printed):
      print(text[len(printed) :], end="", flush=True)
      printed = text
    return False

  return is_complete


def main(argv: Sequence[str]) -> None:
  """Runs the command and exits with its status."""

  def action() -> int:
    *images, question = argv[1:] or ("",)
    if not question.strip() or os.path.isfile(question):
      raise UserError(f"a question is needed, as the last argument, in quotes: {_USAGE}")
    show = None if _SHOW.value is None else pathlib.Path(_SHOW.value)
    ask(model_flags.one_row_config(), images, question, show)
    return 0

  command.execute("himap_jax.ask", argv[:1], action, resumes=False)


if __name__ == "__main__":
  command.start("himap_jax.ask", main)
