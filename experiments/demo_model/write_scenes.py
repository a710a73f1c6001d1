"""Writes scenes with their questions and answers.

python -m experiments.demo_model.write_scenes --split=test --num_scenes=100 --directory=… [--lists]
"""

import pathlib

from absl import app, flags

from experiments.demo_model import questions
from himap_jax.run import command

_SPLIT = flags.DEFINE_enum("split", "test", ["train", "test"], "Split of cut-outs and seeds.")
_NUM_SCENES = flags.DEFINE_integer("num_scenes", 100, "Number of scenes.")
_LISTS = flags.DEFINE_bool("lists", False, "Ask for lists of everything in a scene instead of short answers.")
_DIRECTORY = flags.DEFINE_string("directory", None, "Directory for pictures and questions.jsonl.", required=True)


def run() -> int:
  directory = pathlib.Path(_DIRECTORY.value)
  print(questions.write(directory, _SPLIT.value, _NUM_SCENES.value, lists=_LISTS.value))
  return 0


if __name__ == "__main__":
  app.run(lambda argv: command.execute("experiments.demo_model.write_scenes", argv, run, resumes=False))
