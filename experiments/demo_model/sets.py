"""Sets of generated pictures and questions. As a command it writes one:

    python -m experiments.demo_model.sets --set=details --split=test --num_scenes=100 --directory=…

- `scenes`: cut-outs on a background, with short answers (`questions`).
- `lists`: the same scenes, with answers that list everything in them.
- `details`: small things, signs and sheets of photographs, of known size (`details`).
"""

import json
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from absl import flags

from experiments.demo_model import cutouts, details, questions, scenes, signs
from experiments.demo_model.cutouts import Cutout
from experiments.demo_model.wording import Drawn
from himap_jax.checkpoint import default_cache_dir
from himap_jax.errors import UserError
from himap_jax.run import command
from himap_jax.run.progress import Progress
from himap_jax.run.user_errors import user_error

SETS = ("scenes", "lists", "details")
SPLITS = ("train", "test")
GUESS_SCENES = 1000


Draw = Callable[[np.random.Generator], Drawn]


def scenes_of(pictures: Sequence[Cutout], *, lists: bool = False) -> Draw:
  """Draws scenes of cut-outs with questions, or with lists."""

  def draw(rng: np.random.Generator) -> Drawn:
    scene = scenes.compose(rng, pictures)
    return Drawn(scene, questions.ask_for_lists(scene) if lists else questions.ask(rng, scene))

  return draw


def load(name: str, split: str, *, size: float | None = None) -> Draw:
  """Draws the scenes of a set; `size` is for details alone."""
  if size is not None and name != "details":
    raise UserError(f"a size is that of details; the set {name} has none")
  cache_dir = default_cache_dir()
  pictures = cutouts.load(cache_dir)[split]
  if name == "details":
    parts = details.Parts.of(pictures, signs.faces(cache_dir, split))
    return lambda rng: details.compose(rng, parts, size=size)
  return scenes_of(pictures, lists=name == "lists")


def scene_at(draw: Draw, split: str, index: int) -> Drawn:
  return draw(np.random.default_rng(SPLITS.index(split) * 10**9 + index))


def write(
  directory: pathlib.Path, name: str, split: str, num_scenes: int, *, size: float | None = None
) -> pathlib.Path:
  """Writes pictures with one question of every type that they have; returns the path of `questions.jsonl`.

  A row's `guess` is the commonest answer to the question, or else to its type, in training scenes.
  """
  guesses, draw = _guesses(load(name, "train", size=size)), load(name, split, size=size)
  with user_error(f"cannot create {directory}"):
    directory.mkdir(parents=True, exist_ok=True)
  rows = []
  with Progress(num_scenes, "scene", f"{split} {name}") as progress:
    for index in range(num_scenes):
      drawn = scene_at(draw, split, index)
      drawn.scene.picture.save(directory / f"{index:05d}.png")
      own_size = {} if drawn.size is None else {"size": drawn.size}
      for type, question, answer in (asked[0] for asked in drawn.questions.values() if asked):
        row = {"id": f"{index:05d}-{type}", "image": f"{index:05d}.png", "question": question, "answer": answer}
        rows.append(row | {"type": type, "guess": guesses.get(question, guesses[type])} | own_size)
      progress.update()
  path = directory / "questions.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
  return path


def _guesses(draw: Draw) -> dict[str, str]:
  """The commonest answer to every question and to every type in training scenes."""
  scenes = (scene_at(draw, "train", index) for index in range(GUESS_SCENES))
  seen = (question for drawn in scenes for asked in drawn.questions.values() for question in asked)
  return questions.commonest(pair for type, question, answer in seen for pair in ((question, answer), (type, answer)))


def run() -> int:
  values = flags.FLAGS
  directory = pathlib.Path(values.directory)
  print(write(directory, values["set"].value, values.split, values.num_scenes, size=values["size"].value))
  return 0


if __name__ == "__main__":
  flags.DEFINE_enum("set", "scenes", SETS, "Set to write.")
  flags.DEFINE_enum("split", "test", SPLITS, "Split of cut-outs, typefaces and seeds.")
  flags.DEFINE_integer("num_scenes", 100, "Number of scenes.")
  flags.DEFINE_float("size", None, "Size of small things and digits in details, in image tokens; mixed if absent.")
  flags.DEFINE_string("directory", None, "Directory for pictures and questions.jsonl.", required=True)
  command.start_action("experiments.demo_model.sets", run, resumes=False)
