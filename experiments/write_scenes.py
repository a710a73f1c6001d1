"""Writes scenes with their questions and answers.

python -m experiments.write_scenes --split=test --num_scenes=100 --directory=… [--lists]
"""

import pathlib

from absl import app, flags

from experiments import scenes

_SPLIT = flags.DEFINE_enum("split", "test", ["train", "test"], "Whose cut-outs and seeds.")
_NUM_SCENES = flags.DEFINE_integer("num_scenes", 100, "Scenes to write.")
_LISTS = flags.DEFINE_bool("lists", False, "Ask for lists of everything in a scene in place of short answers.")
_DIRECTORY = flags.DEFINE_string("directory", None, "Where to write pictures and questions.jsonl.", required=True)


def main(_) -> None:
  print(scenes.write(pathlib.Path(_DIRECTORY.value), _SPLIT.value, _NUM_SCENES.value, lists=_LISTS.value))


if __name__ == "__main__":
  app.run(main)
