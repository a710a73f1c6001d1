"""Where visual information flows, layer by layer: the saliency of attention (HiMAP, sections 2 and 3.1).

    python -m experiments.saliency --flagfile=experiments/flags/saliency.flags

For every layer: what flows from the image into the instruction (S_vt) and within the image (S_vv), the other blocks, what the
last token receives from each kind of token, and where in the picture it comes from. Interrupt it at any time: the same command
goes on where it stopped.
"""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before transformers is imported anywhere

import sys
import textwrap

from absl import app, flags

from experiments import tabular
from experiments.flow import subject_flags
from experiments.saliency import plots, study, tables
from himap_jax import command

flags.adopt_module_key_flags(subject_flags)  # for --help
_LAYERS_AT_A_TIME = flags.DEFINE_integer(
  "layers_at_a_time", 10, "Whose saliency is held at once; each takes 4 bytes × rows × slots².", lower_bound=1
)
_NUM_MAPS = flags.DEFINE_integer("num_maps", 4, "Pictures to draw maps on.", lower_bound=0)
_MAP_LAYERS = flags.DEFINE_list("map_layers", None, "Layers to draw them for; eight, evenly, by default.")


def main(argv: list[str]) -> None:
  command.execute("saliency", argv, run)


def run() -> int:
  """Measures what is missing and writes tables and plots."""
  workdir, output = subject_flags.directories()
  studied = subject_flags.read(workdir)
  num_layers = studied.num_layers
  layers = command.numbers(_MAP_LAYERS, int) or tuple(dict.fromkeys(num_layers * step // 8 for step in range(8)))
  if not all(0 <= layer < num_layers for layer in layers):
    raise ValueError(f"--map_layers: the model has layers 0 to {num_layers - 1}")
  command.hold_to_settings(workdir / "settings.json", studied.settings, "use another --workdir")
  questions, flow = study.run(studied, workdir, layers_at_a_time=_LAYERS_AT_A_TIME.value)
  blocks = tables.blocks(flow, studied.loaded.config.text.num_attention_heads)
  shares = tables.contributions(flow)
  heading = f"`python -m experiments.saliency {' '.join(sys.argv[1:])}`, {len(questions)} questions."
  tabular.write_csv(output / "saliency.csv", tables.rows_of_blocks(blocks))
  tabular.write_csv(output / "contributions.csv", tables.rows_of_contributions(shares))
  tables.write_markdown(output / "saliency.md", blocks, shares, flow, heading)
  plots.plot_blocks(output / "saliency.png", blocks)
  plots.plot_contributions(output / "contributions.png", shares)
  chosen = list({question.image: index for index, question in reversed(list(enumerate(questions)))}.values())
  chosen = sorted(chosen)[: _NUM_MAPS.value]
  processor = studied.processor
  if chosen and flow.to_instruction.shape[-1] == processor.patch_grid[0] * processor.patch_grid[1]:
    pictures = [
      (textwrap.fill(questions[index].question, 24), processor.picture(studied.example(questions[index])))
      for index in chosen
    ]
    for name in ("to_instruction", "to_image"):
      maps = getattr(flow, name)[:, chosen]
      plots.plot_maps(output / f"maps_{name}.png", pictures, maps, processor.patch_grid, layers)
  print((output / "saliency.md").read_text(encoding="utf-8"))
  return 0


if __name__ == "__main__":
  app.run(main)
