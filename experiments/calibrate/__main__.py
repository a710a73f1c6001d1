"""Proposes a schedule of HiMAP for a checkpoint, from what its own layers do with images.

    python -m experiments.calibrate --checkpoint=demo --budget=24% --question_set=prompts.jsonl --workdir=… --output=…

On some hundred questions, whose answers need not be known, it measures where the flow of visual information goes (saliency), what
it matters there (disruption) and what HiMAP would keep (scores). Of all layers and keep counts within the budget it takes those
whose dropped tokens would have carried least, runs the best of them, and writes `schedule.json` for `himap_jax.run --schedule`,
with the agreement with no pruning to expect. `--num_heldout` compares it on other questions with the paper's setting and with a grid.
Interrupt it at any time: the same command goes on where it stopped.
"""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before transformers is imported anywhere

import dataclasses
import sys

from absl import app, flags

from checkpoints_convert.source import write_json
from experiments.calibrate import measure, study
from experiments.flow import subject_flags
from himap_jax import command

flags.adopt_module_key_flags(subject_flags)  # for --help
_BUDGET = flags.DEFINE_string("budget", "24%", "FLOPs on image tokens (HiMAP, Eq. 10) in units of no pruning.")
_NUM_HELDOUT = flags.DEFINE_integer(
  "num_heldout", 0, "Of --num_questions, those that calibration does not see, for the comparison.", lower_bound=0
)
_NUM_TRIED = flags.DEFINE_integer("num_tried", 5, "Schedules that are run on the calibration questions.", lower_bound=1)
_LAYERS_AT_A_TIME = flags.DEFINE_integer("layers_at_a_time", 10, "As in experiments.saliency.", lower_bound=1)
_DISRUPTED_LAYERS = flags.DEFINE_list(
  "disrupted_layers", None, "As --layers of experiments.disruption; every one by default."
)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 8, "The longest answer, in tokens.", lower_bound=1)


def main(argv: list[str]) -> None:
  command.execute("calibrate", argv, run)


def run() -> int:
  """Measures what is missing and writes the schedule and the tables."""
  try:
    budget = command.keep_count(_BUDGET.value)
  except ValueError as error:
    raise ValueError(f"--budget={_BUDGET.value}: not a share such as 24%") from error
  if not isinstance(budget, float) or not 0 < budget <= 1:
    raise ValueError(f"--budget={_BUDGET.value}: not a share such as 24%")
  workdir, output = subject_flags.directories()
  studied = subject_flags.read(workdir)
  count = len(studied.questions) - _NUM_HELDOUT.value
  if count < 1:
    raise ValueError(
      f"--num_heldout={_NUM_HELDOUT.value} leaves none of {len(studied.questions)} questions to calibrate on"
    )
  layers = command.numbers(_DISRUPTED_LAYERS, int) or tuple(range(studied.num_layers))
  if list(layers) != sorted(set(layers)) or not all(0 <= layer < studied.num_layers for layer in layers):
    raise ValueError(f"--disrupted_layers must ascend from 0 to {studied.num_layers - 1}")
  own = (_NUM_HELDOUT, _MAX_NEW_TOKENS, _DISRUPTED_LAYERS)
  settings = studied.settings | {flag.name: flag.value for flag in own}
  command.hold_to_settings(workdir / "settings.json", settings, "use another --workdir")
  chosen, heldout = study.split(studied.questions, _NUM_HELDOUT.value, seed=studied.seed)
  calibration = dataclasses.replace(studied, questions=chosen)
  measured = measure.measure(calibration, workdir, layers_at_a_time=_LAYERS_AT_A_TIME.value, disrupted_layers=layers)
  tried = study.try_proposals(
    calibration, measured, budget, workdir, count=_NUM_TRIED.value, max_new_tokens=_MAX_NEW_TOKENS.value
  )
  best = study.best(tried)
  expected = study.expected_agreement(tried, seed=studied.seed)
  write_json(output / "schedule.json", study.describe(best, expected, studied, measured))
  compared = []
  if heldout:
    others = dataclasses.replace(studied, questions=heldout)
    compared = study.compare(others, best, measured, budget, workdir, max_new_tokens=_MAX_NEW_TOKENS.value)
  heading = f"`python -m experiments.calibrate {' '.join(sys.argv[1:])}`, {len(best.same)} questions."
  study.write(output, tried, expected, compared, heading, seed=studied.seed)
  print((output / "calibrate.md").read_text(encoding="utf-8"))
  return 0


if __name__ == "__main__":
  app.run(main)
