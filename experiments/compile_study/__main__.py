"""Costs and benefits of static shapes: the same HiMAP prefill in several forms, on prompts of mixed lengths.

    python -m experiments.compile_study --flagfile=experiments/flags/compile_study.flags

Every variant runs in separate processes: once with an empty compilation cache, then in turns with a filled one.
Variants are also compiled for a TPU, which needs libtpu (`pip install -e '.[tpu]'`) but no TPU. Repeating an
interrupted command resumes it.
"""

import dataclasses
import pathlib

from absl import app, flags

from experiments.compile_study import measure, tables
from experiments.compile_study.measure import Setting
from experiments.compile_study.variants import VARIANTS
from experiments.shared import machine, planned, study
from experiments.shared.geometries import GEOMETRIES
from himap_jax.generation import InputConfig
from himap_jax.run import command

_VARIANTS = flags.DEFINE_list("variants", list(VARIANTS), f"Any of {', '.join(VARIANTS)}.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "demo", "As in himap_jax.run.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", sorted(command.DTYPES), "As in himap_jax.run.")
_NUM_PROMPTS = flags.DEFINE_integer("num_prompts", 48, "Prompts in the workload.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 4, "Prompts per batch.", lower_bound=1)
_PROMPT_BUCKETS = flags.DEFINE_list("prompt_buckets", ["64", "128", "256", "512"], "As in himap_jax.run.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the prompt lengths.")
_PRUNE_LAYERS = flags.DEFINE_list("prune_layers", None, "HiMAP's layers, as in himap_jax.run.")
_KEEP = flags.DEFINE_list("keep", None, "HiMAP's keep counts, as in himap_jax.run.")
_TURNS = flags.DEFINE_integer("turns", 3, "Measurements of every variant after the first.", lower_bound=1)
_TOPOLOGY = flags.DEFINE_string("topology", "", "TPU slice to compile for, such as v5e:2x4; none if empty.")
_TENSOR = flags.DEFINE_integer("tensor", 4, "Devices of the slice that share the heads.", lower_bound=1)
_GEOMETRY = flags.DEFINE_enum("geometry", "7b", list(GEOMETRIES), "Model sizes to compile for the slice.")
_TPU_BATCH_SIZE = flags.DEFINE_integer("tpu_batch_size", 8, "Rows of the whole slice.", lower_bound=1)
_TPU_BUCKET = flags.DEFINE_integer("tpu_bucket", 128, "Padded text length of these rows.", lower_bound=1)
_WORKDIR = flags.DEFINE_string("workdir", "compile_study_work", "Directory of measurements, to resume from.")
_OUTPUT = flags.DEFINE_string("output", "compile_study_output", "Directory of tables and plots.")


def run() -> int:
  variants = study.chosen(_VARIANTS, VARIANTS)
  planned.without_devices()
  setting = Setting(
    _CHECKPOINT.value,
    _DTYPE.value,
    _NUM_PROMPTS.value,
    InputConfig(prompt_buckets=command.numbers(_PROMPT_BUCKETS, int), batch_size=_BATCH_SIZE.value),
    _SEED.value,
    command.numbers(_PRUNE_LAYERS, int),
    command.numbers(_KEEP, command.keep_count),
  )
  place, tpu_heading = {}, None
  if _TOPOLOGY.value:
    place = {"geometry": _GEOMETRY.value, "topology": _TOPOLOGY.value, "tensor": _TENSOR.value}
    place |= {"batch_size": _TPU_BATCH_SIZE.value, "num_text_slots": _TPU_BUCKET.value}
    planned.mesh_of(_TOPOLOGY.value, _TENSOR.value)
    tpu_heading = (
      "For {topology}, mesh data × tensor:{tensor}, sizes of {geometry}, {batch_size} rows of {num_text_slots} text "
      "slots, by the compiler alone (libtpu {libtpu}):"
    ).format(**place, **machine.versions("libtpu"))
  workdir = study.open_workdir(
    setting=dataclasses.asdict(setting),
    place=place,
    processor=machine.processor(),
    **machine.versions("jax"),
    code=machine.checksum_of_library(pathlib.Path(__file__).parent.glob("*.py")),
  )
  results = measure.run(variants, setting, place, turns=_TURNS.value, workdir=workdir)
  count = f"{machine.processor()}, medians of {_TURNS.value} turns"
  print(study.write(tables.report(tables.make_rows(*results), count, tpu_heading), "compile_study"))
  return 0


if __name__ == "__main__":
  app.run(lambda argv: command.execute("compile_study", argv, run))
