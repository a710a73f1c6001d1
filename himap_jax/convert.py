"""Converts a checkpoint, for object storage or to int8 weights ahead of time.

    python -m himap_jax.convert --source=llava-hf/llava-1.5-7b-hf --target=gs://bucket/llava-1.5-7b

A directory in the Hugging Face layout needs no conversion: `himap_jax.run` reads it directly.
"""

from himap_jax.run import startup

startup.begin()

import pathlib

import jax
from absl import flags

from checkpoints_convert import remote
from checkpoints_convert.convert import convert, open_source
from himap_jax.checkpoint import default_cache_dir, describe
from himap_jax.run import command, flag_values

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
  "vision_tower",
  None,
  "For the original layout: directory or id of the vision tower (CLIP or InternViT), if not as in config.json.",
)
_INT8_WEIGHTS = flags.DEFINE_bool(
  "int8_weights",
  False,
  "Write the weights of the decoder's linear layers, and of a head that is not the embedding, as int8, for "
  "himap_jax.run --int8_weights.",
)
_ALLOW_PICKLE = flags.DEFINE_bool("allow_pickle", False, "As in himap_jax.run, also for the tower.")


def run() -> int:
  """Converts the checkpoint that the flags name and prints the target."""
  jax.config.update("jax_platforms", "cpu")
  source = open_source(_SOURCE.value, _VISION_TOWER.value, allow_pickle=_ALLOW_PICKLE.value)
  target = _TARGET.value
  if not remote.is_remote(target):
    own = pathlib.Path(target).expanduser()
    flag_values.check_outside("target", own, source.directory, "the directory of the source")
  print(convert(source, target, describe, cache_dir=default_cache_dir(), int8_weights=_INT8_WEIGHTS.value))
  return 0


if __name__ == "__main__":
  command.start_action("himap_jax.convert", run, needed=("source", "target"), resumes=False)
