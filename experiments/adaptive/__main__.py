"""Adaptive keep counts against fixed ones at equal FLOPs.

    python -m experiments.adaptive --flagfile=experiments/flags/adaptive.flags

Answers all questions on every rung of a ladder of HiMAP schedules and measures what share of the instruction's attention each
rung's tokens hold. A row of `--method=himap_adaptive` is that of its rung, so these say what every threshold comes to: accuracy,
agreement with no pruning, and FLOPs, beside fixed HiMAP at the same FLOPs. Interrupt it at any time: the same command goes on
where it stopped.
"""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before transformers is imported anywhere

import sys

from absl import app, flags

from experiments import tabular
from experiments.adaptive import plots, study, tables
from experiments.flow import subject_flags
from himap_jax import adaptive, command

flags.adopt_module_key_flags(subject_flags)  # for --help
_LADDER = flags.DEFINE_list("ladder", list(adaptive.LADDER), "As in himap_jax.run.")
_PRUNE_LAYERS = flags.DEFINE_list("prune_layers", ["2", "8"], "As in himap_jax.run.")
_THRESHOLDS = flags.DEFINE_list(
  "thresholds", ["0.5", "0.6", "0.7", "0.75", "0.8", "0.85", "0.9", "0.95", "0.98"], "What to ask of a rung."
)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 8, "The longest answer, in tokens.", lower_bound=1)


def main(argv: list[str]) -> None:
  command.execute("adaptive", argv, run)


def run() -> int:
  """Measures what is missing and writes the table and the plot."""
  workdir, output = subject_flags.directories()
  thresholds = command.numbers(_THRESHOLDS, float) or ()
  studied = subject_flags.read(workdir, needs_answers=True)
  ladders = [
    adaptive.build_ladder(
      num_layers=studied.num_layers,
      num_image_tokens=studied.processor.num_image_tokens,
      prune_layers=command.numbers(_PRUNE_LAYERS, int),
      keeps=command.ladder(_LADDER),
      threshold=threshold,
    )
    for threshold in thresholds
  ]
  if not ladders:
    raise ValueError("--thresholds: at least one is needed")
  own = {"prune_layers": _PRUNE_LAYERS.value, "max_new_tokens": _MAX_NEW_TOKENS.value}
  command.hold_to_settings(workdir / "settings.json", studied.settings | own, "use another --workdir")
  outcomes = study.measure(studied, ladders[0].rungs, workdir, max_new_tokens=_MAX_NEW_TOKENS.value)
  fixed, adapted = tables.rows(outcomes, ladders, seed=studied.seed)
  tabular.write_csv(output / "adaptive.csv", [*fixed, *adapted])
  heading = f"`python -m experiments.adaptive {' '.join(sys.argv[1:])}`, {outcomes.right.shape[1]} questions."
  tables.write_markdown(output / "adaptive.md", fixed, adapted, heading, tables.cheapest(outcomes))
  plots.plot(output / "adaptive.png", fixed, adapted)
  print((output / "adaptive.md").read_text(encoding="utf-8"))
  return 0


if __name__ == "__main__":
  app.run(main)
