"""Answers a question about pictures in the terminal.

    python -m himap_jax.ask picture.jpg "What is on the table?" --show=kept.png

The text appears as it is generated.
"""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before transformers is imported anywhere

import collections
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Sequence

from absl import app, flags

from himap_jax.engine.accounting import method_inputs
from himap_jax.engine.capacity import BatchSizes
from himap_jax.engine.engine import Batch
from himap_jax.engine.pool import Request
from himap_jax.errors import UserError
from himap_jax.generation import make_batcher
from himap_jax.run import command, model_flags
from himap_jax.run.drawing import draw_kept
from himap_jax.run.model_flags import AnswerConfig
from himap_jax.run.pictures import PictureFiles

flags.adopt_module_key_flags(model_flags)  # for --help
_SHOW = flags.DEFINE_string("show", None, "PNG file to write: the pictures with the patches kept at each stage.")

STEPS = 4  # tokens that appear together
INCOMPLETE = "\ufffd"  # what a tokenizer gives for a character of which tokens are missing


def ask(config: AnswerConfig, images: Sequence[str], question: str, show: pathlib.Path | None = None) -> None:
  """Prints the answer, and on stderr what was kept and the time it took.

  Raises:
    UserError, CheckpointError: a picture or the checkpoint cannot be read, or the question does not fit the model.
  """
  files = PictureFiles(allow_urls=config.allow_urls)
  pictures = [files.load(image)[0] for image in images]
  command.use_compilation_cache(config.compilation_cache_dir)
  opened = config.open()
  processor = opened.prompts(config.inputs.prompt_template, config.inputs.max_image_tokens)
  schedule = config.pruning.schedule(**method_inputs(opened.config))
  example = processor.prepare(pictures, question)
  most, buckets = config.generation.max_new_tokens, config.inputs.prompt_buckets
  batcher = make_batcher(opened, processor, collections.Counter([example.size]), buckets, most, schedule)
  bucket = batcher.bucket(example)
  loaded = config.restore(opened, config.make_mesh(opened))
  engine = loaded.engine(schedule, config.generation, BatchSizes(1, 1), most_steps=STEPS)
  num_rows = engine.prefill_rows(batcher.pack([], bucket=bucket, batch_size=1))
  inputs = batcher.pack([example], bucket=bucket, batch_size=num_rows)
  batch = Batch(inputs, [Request(0, is_complete=_printing(processor.decode))])
  with command.out_of_memory_is_user_error(lambda: f"{bucket.num_image_tokens} image tokens"):
    (answered,) = (row for turn in engine.answer([batch]) for row in turn)
  print(flush=True)
  kept = "".join(
    f", {len(own)} from layer {stage.layer} on" for own, stage in zip(answered.kept, schedule.stages, strict=True)
  )
  times = f"prefill {answered.prefill_seconds:.2f} s, {len(answered.tokens)} tokens {answered.decode_seconds:.2f} s"
  print(f"{config.pruning.label}: {example.num_image_tokens} image tokens{kept}; {times}", file=sys.stderr)
  if show is not None:
    with command.user_error(f"--show: cannot write {show}"):
      draw_kept(processor.views(example), answered.kept).save(show, format="PNG")


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
    if len(argv) < 2:
      raise UserError('a question is needed: python -m himap_jax.ask picture.jpg "What is it?"')
    *images, question = argv[1:]
    show = None if _SHOW.value is None else pathlib.Path(_SHOW.value)
    if show is not None and not images:
      raise UserError("--show needs a picture")
    values = model_flags.values_from_flags()
    one_row = dataclasses.replace(values["inputs"], batch_size=1)
    ask(AnswerConfig(**values | {"inputs": one_row}), images, question, show)
    return 0

  command.execute("himap_jax.ask", argv[:1], action, resumes=False)


if __name__ == "__main__":
  app.run(main)
