"""Converts a LLaVA checkpoint to the layout that himap_jax loads.

python -m checkpoints_convert.llava --source=llava-hf/llava-1.5-7b-hf --target=converted/llava-1.5-7b
"""

import jax
from absl import app, flags

from checkpoints_convert.convert import convert
from himap_jax import command

_SOURCE = flags.DEFINE_string(
  "source",
  None,
  "Checkpoint: a directory or a Hugging Face id, in the Hugging Face or the original LLaVA layout.",
  required=True,
)
_TARGET = flags.DEFINE_string(
  "target", None, "Directory to write, also in object storage as gs://bucket/name.", required=True
)
_VISION_TOWER = flags.DEFINE_string(
  "vision_tower", None, "For the original layout: the CLIP tower's directory or id, if not what config.json names."
)


def run() -> int:
  """Converts what the flags name and prints where it lies."""
  jax.config.update("jax_platforms", "cpu")
  print(convert(_SOURCE.value, _TARGET.value, vision_tower=_VISION_TOWER.value))
  return 0


def main(argv: list[str]) -> None:
  """Runs the command and exits with its status."""
  command.execute("checkpoints_convert", argv, run, resumes=False)


if __name__ == "__main__":
  app.run(main)
