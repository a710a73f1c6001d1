"""Converts a LLaVA checkpoint to the layout that himap_jax loads.

python -m checkpoints_convert.llava --source=llava-hf/llava-1.5-7b-hf --target=converted/llava-1.5-7b
"""

import sys

import jax
from absl import app, flags, logging

from checkpoints_convert.convert import convert

_SOURCE = flags.DEFINE_string(
  "source",
  None,
  "Checkpoint: a directory or a Hugging Face id, in the Hugging Face or the original LLaVA layout.",
  required=True,
)
_TARGET = flags.DEFINE_string("target", None, "Directory to write.", required=True)
_VISION_TOWER = flags.DEFINE_string(
  "vision_tower", None, "For the original layout: the CLIP tower's directory or id, if not what config.json names."
)


def main(argv: list[str]) -> None:
  """Runs the command and exits with its status."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  logging.set_verbosity(logging.WARNING)  # Orbax tells of every step
  jax.config.update("jax_platforms", "cpu")
  try:
    target = convert(_SOURCE.value, _TARGET.value, vision_tower=_VISION_TOWER.value)
  except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")
  print(target)


if __name__ == "__main__":
  app.run(main)
