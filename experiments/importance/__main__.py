"""Does HiMAP keep what holds information, or what has attention? Scores and contents are manipulated, one without the other.

    python -m experiments.importance --flagfile=experiments/flags/importance.flags

Pairs of questions with the same text about different pictures are answered with the scores of the own picture, of the other one,
shuffled and reversed; with the other picture's hidden states where the own scores choose, and where its own do; and pictures get
the middle of another, to see whether scores go with the contents or with the place. Interrupt it at any time: the same command
goes on where it stopped.
"""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before transformers is imported anywhere

import math
import sys

from absl import app, flags

from experiments import kept, tabular
from experiments.flow import subject_flags
from experiments.importance import study, tables
from himap_jax import command
from himap_jax.methods import build_schedule

flags.adopt_module_key_flags(subject_flags)  # for --help
_NUM_PAIRS = flags.DEFINE_integer("num_pairs", 50, "Pairs of questions, drawn from --num_questions.", lower_bound=1)
_PRUNE_LAYERS = flags.DEFINE_list("prune_layers", ["2", "8"], "Of HiMAP, as in himap_jax.run.")
_KEEP = flags.DEFINE_list("keep", ["50%", "12.5%"], "Of HiMAP, as in himap_jax.run.")


def main(argv: list[str]) -> None:
  command.execute("importance", argv, run)


def run() -> int:
  """Measures what is missing and writes the tables."""
  workdir, output = subject_flags.directories()
  studied = subject_flags.read(workdir, needs_answers=True)
  config = studied.loaded.config
  schedule = build_schedule(
    "himap",
    num_layers=studied.num_layers,
    num_image_tokens=studied.processor.num_image_tokens,
    has_class_token=config.vision.has_class_token,
    prune_layers=command.numbers(_PRUNE_LAYERS, int),
    keep=command.numbers(_KEEP, command.keep_count),
  )
  if studied.processor.num_image_tokens != math.prod(studied.processor.patch_grid):
    raise ValueError(
      f"the checkpoint's {studied.processor.num_image_tokens} image tokens are not the patches of a picture, which are swapped here"
    )
  pairs = study.make_pairs(study.askable(studied), _NUM_PAIRS.value, seed=studied.seed)
  if not pairs:
    raise ValueError(
      "no two questions have the same text, different pictures and different answers; use more questions"
    )
  chosen = {"num_pairs": _NUM_PAIRS.value, "prune_layers": _PRUNE_LAYERS.value, "keep": _KEEP.value}
  command.hold_to_settings(workdir / "settings.json", studied.settings | chosen, "use another --workdir")
  answers = study.answers(studied, pairs, schedule, workdir)
  each = kept.json_of(
    workdir / "correlations.json", lambda: study.correlations(studied, pairs, schedule.stages[0].layer)
  )
  measured = tables.rows(pairs, answers, seed=studied.seed)
  correlations = tables.correlation_row(each, seed=studied.seed)
  tabular.write_csv(output / "importance.csv", measured)
  tabular.write_csv(output / "correlations.csv", [correlations])
  heading = f"`python -m experiments.importance {' '.join(sys.argv[1:])}`, {len(pairs)} pairs."
  tables.write_markdown(output / "importance.md", measured, correlations, heading)
  print((output / "importance.md").read_text(encoding="utf-8"))
  return 0


if __name__ == "__main__":
  app.run(main)
