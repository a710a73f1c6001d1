"""Costs and benefits of static shapes: the same HiMAP prefill in several forms, on prompts of mixed lengths.

    python -m experiments.compile_study --flagfile=experiments/flags/compile_study.flags

Every variant runs in separate processes: once with an empty compilation cache, then in turns with a filled one.
Variants are also compiled for a TPU, which needs libtpu (`pip install -e '.[tpu]'`) but no TPU. Repeating an
interrupted command resumes it.
"""

import dataclasses
import pathlib
from typing import Any

from absl import flags

from experiments.compile_study import answering, measure, report
from experiments.compile_study.measure import Setting
from experiments.compile_study.variants import VARIANTS
from experiments.shared import machine, planned, study
from experiments.shared.geometries import GEOMETRIES
from himap_jax import checkpoint
from himap_jax.generation import InputConfig
from himap_jax.run import flag_values


def define_flags() -> None:
  flags.DEFINE_list("variants", list(VARIANTS), f"Any of {', '.join(VARIANTS)}.")
  flags.DEFINE_string("checkpoint", "demo", "As in himap_jax.run.")
  flags.DEFINE_enum("dtype", "bfloat16", sorted(checkpoint.DTYPES), "As in himap_jax.run.")
  flags.DEFINE_integer("num_prompts", 48, "Prompts in the workload.", lower_bound=1)
  flags.DEFINE_integer("batch_size", 4, "Prompts per batch.", lower_bound=1)
  flags.DEFINE_integer("slots", 8, "Rows that are decoded together: slots, and rows of a static batch.", lower_bound=2)
  flags.DEFINE_list("prompt_buckets", ["64", "128", "256", "512"], "As in himap_jax.run.")
  flags.DEFINE_integer("seed", 0, "Seed of the prompt lengths.")
  flags.DEFINE_list("prune_layers", None, "HiMAP's layers, as in himap_jax.run.")
  flags.DEFINE_list("keep", None, "HiMAP's keep counts, as in himap_jax.run.")
  flags.DEFINE_integer("turns", 3, "Measurements of every variant after the first.", lower_bound=1)
  flags.DEFINE_string("topology", "", "TPU slice to compile for, such as v5e:2x4; none if empty.")
  flags.DEFINE_integer("tensor", 4, "Devices of the slice that share the heads.", lower_bound=1)
  flags.DEFINE_enum("geometry", "7b", list(GEOMETRIES), "Model sizes to compile for the slice.")
  flags.DEFINE_integer("tpu_batch_size", 8, "Rows of the whole slice.", lower_bound=1)
  flags.DEFINE_integer("tpu_bucket", 128, "Padded text length of these rows.", lower_bound=1)


def run(values: Any) -> study.Report:
  variants = flag_values.chosen(values["variants"], VARIANTS)
  planned.without_devices()
  setting = Setting(
    **{name: values[name].value for name in ("checkpoint", "dtype", "num_prompts", "seed")},
    inputs=InputConfig(prompt_buckets=flag_values.buckets(values["prompt_buckets"]), batch_size=values.batch_size),
    prune_layers=flag_values.numbers(values["prune_layers"], int),
    keep=flag_values.numbers(values["keep"], flag_values.keep_count),
  )
  place, tpu_heading = {}, None
  if values.topology:
    place = {name: values[name].value for name in ("geometry", "topology", "tensor")}
    place |= {"batch_size": values.tpu_batch_size, "num_text_slots": values.tpu_bucket}
    planned.mesh_of(values.topology, values.tensor)
    tpu_heading = (
      "For {topology}, mesh data × tensor:{tensor}, sizes of {geometry}, {batch_size} rows of {num_text_slots} text "
      "slots, by the compiler alone (libtpu {libtpu}):"
    ).format(**place, **machine.versions("libtpu"))
  workdir = study.open_workdir(
    setting=dataclasses.asdict(setting),
    place=place,
    slots=values.slots,
    processor=machine.processor(),
    **machine.versions("jax"),
    code=machine.checksum_of_library(pathlib.Path(__file__).parent.glob("*.py")),
  )
  in_turns = {"turns": values.turns, "workdir": workdir}
  processes = measure.in_turns(measure.on_this_machine, variants, setting, **in_turns)
  tpu = measure.on_tpu(variants, place, workdir) if place else {}
  with_slots = dataclasses.replace(setting, inputs=dataclasses.replace(setting.inputs, batch_size=values.slots))
  forms = measure.in_turns(answering.on_this_machine, answering.FORMS, with_slots, **in_turns)
  count = f"{machine.processor()}, medians of {values.turns} turns"
  return report.make(report.make_rows(processes, tpu), report.make_form_rows(forms, values.slots), count, tpu_heading)


if __name__ == "__main__":
  study.start("compile_study", define_flags, run, has_subject=False)
