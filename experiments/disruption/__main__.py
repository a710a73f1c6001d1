"""What happens to answers when visual information cannot flow, layer by layer (HiMAP, section 3.2 and 3.3).

    python -m experiments.disruption --flagfile=experiments/flags/disruption.flags

Takes the flow from image to instruction or within the image out of one layer, or of it and all after it; as controls as many pairs
at random, pairs that together have the same probability, or the flow from image to as many random tokens; or puts the flow's
mean over the other questions in its place.
Interrupt it at any time: the same command goes on where it stopped.
"""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before transformers is imported anywhere

import sys

from absl import app, flags

from experiments import tabular
from experiments.disruption import plots, study, tables
from experiments.disruption.interventions import BLOCKS, CHOSEN, HOW, Intervention
from experiments.flow import subject_flags
from himap_jax import command

flags.adopt_module_key_flags(subject_flags)  # for --help
_HOW = flags.DEFINE_list("how", list(HOW), "; ".join(f"{name}: {meaning}" for name, meaning in HOW.items()))
_CHOSEN = flags.DEFINE_list("chosen", list(CHOSEN), "; ".join(f"{name}: {meaning}" for name, meaning in CHOSEN.items()))
_LAYERS = flags.DEFINE_list("layers", None, "Which to disrupt; every one by default.")


def main(argv: list[str]) -> None:
  command.execute("disruption", argv, run)


def run() -> int:
  """Measures what is missing and writes tables and plots."""
  for flag, known in ((_HOW, HOW), (_CHOSEN, CHOSEN)):
    for name in flag.value:
      if name not in known:
        raise ValueError(f"--{flag.name}: unknown {name!r}; known: {', '.join(known)}")
  workdir, output = subject_flags.directories()
  studied = subject_flags.read(workdir)
  layers = command.numbers(_LAYERS, int) or tuple(range(studied.num_layers))
  if not all(0 <= layer < studied.num_layers for layer in layers):
    raise ValueError(f"--layers: the model has layers 0 to {studied.num_layers - 1}")
  every = (Intervention(block, chosen, how) for how in _HOW.value for chosen in _CHOSEN.value for block in BLOCKS)
  interventions = [one for one in every if one.is_known]
  if not interventions:
    raise ValueError("--how=mean needs --chosen=block: other pairs have no mean")
  settings = studied.settings | {"how": _HOW.value, "chosen": _CHOSEN.value, "layers": layers}
  command.hold_to_settings(workdir / "settings.json", settings, "use another --workdir")
  questions, outcome = study.run(studied, interventions, layers, workdir)
  measured = tables.rows(outcome, interventions, layers, seed=studied.seed)
  bias = tables.bias_rows(outcome, interventions, layers, seed=studied.seed)
  tabular.write_csv(output / "disruption.csv", measured)
  tabular.write_csv(output / "bias.csv", bias)
  heading = f"`python -m experiments.disruption {' '.join(sys.argv[1:])}`, {len(questions)} questions."
  tables.write_markdown(output / "disruption.md", measured, bias, heading)
  plots.plot_consistency(output / "disruption.png", measured)
  plots.plot_bias(output / "bias.png", bias)
  print((output / "disruption.md").read_text(encoding="utf-8"))
  return 0


if __name__ == "__main__":
  app.run(main)
