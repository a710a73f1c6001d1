"""Counts the kernels that a prefill starts on a GPU, which bound a prefill of few rows.

    python -m experiments.speed.kernels --geometry=7b --batch_sizes=1,16

By XLA's compiler for an H200, without a GPU and without weights: it needs `pip install -e '.[cuda]'`. It says nothing
about time. Products are not tuned, so their kernels may be others on a GPU.
"""

import collections
import itertools
import re

from absl import flags
from jax.sharding import Mesh

from experiments.shared import compiler_report, geometries, planned, tabular
from himap_jax.engine import programs
from himap_jax.engine.decoding import DecodeConfig
from himap_jax.errors import UserError
from himap_jax.pruning.methods import METHODS
from himap_jax.run import command, flag_values
from himap_jax.run.progress import Progress

_GEOMETRY = flags.DEFINE_enum("geometry", "7b", list(geometries.GEOMETRIES), "Model sizes.")
_METHODS = flags.DEFINE_list("methods", ["none", "fastv", "himap"], "Methods with their default schedules.")
_BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["1", "16"], "Rows of a prefill.")
_TENSOR = flags.DEFINE_integer("tensor", 1, "GPUs that share the heads.", lower_bound=1)
_BUCKET = flags.DEFINE_integer("bucket", 128, "Padded text length.", lower_bound=1)

STAGE = re.compile(r"prune_before_layer_\d+/(score|gather)")
PARTS = {"score": "choosing tokens", "gather": "dropping tokens"}
REST = "tower and decoder"
NOT_TUNED = {"xla_gpu_autotune_level": "0"}  # tuning needs a GPU


def part_of(scope: str) -> str:
  stage = STAGE.search(scope)
  return PARTS[stage[1]] if stage else REST


def count(mesh: Mesh, geometry: str, method: str, batch_size: int, num_text_slots: int) -> tuple[str, ...]:
  """A row of the table."""
  sizes = {"batch_size": batch_size, "num_text_slots": num_text_slots}
  model, inputs, seeds = planned.shapes_on(mesh, geometry, **sizes)
  schedule = geometries.schedule_of(model.config, method)
  own = programs.Programs(model, schedule, DecodeConfig(1))
  try:
    lowered = own.lower(inputs, seeds, programs.method_parameters(schedule), num_slots=batch_size)
  except NotImplementedError as error:  # JAX checks wide heads against the GPU that is present
    raise UserError(f"{geometry} cannot be lowered without a GPU: {error}") from error
  found = compiler_report.count_kernels(lowered.prefill.compile(NOT_TUNED))
  kernels = collections.Counter()
  for scope, number in found.kernels.items():
    kernels[part_of(scope)] += number
  return method, str(batch_size), *(str(kernels[part]) for part in (REST, *PARTS.values())), str(found.passes.total())


def run() -> int:
  flag_values.chosen(_METHODS, METHODS)
  planned.without_devices()
  mesh, sizes = planned.gpus(_TENSOR.value), flag_values.numbers(_BATCH_SIZES, int)
  rows = []
  with Progress(len(_METHODS.value) * len(sizes), "program", "programs") as progress:
    for method, size in itertools.product(_METHODS.value, sizes):
      rows.append(count(mesh, _GEOMETRY.value, method, size, _BUCKET.value))
      progress.update()
  header = "method", "rows", f"kernels of {REST}", *PARTS.values(), "passes through loops"
  print("\n".join(tabular.markdown(header, rows)))
  return 0


if __name__ == "__main__":
  command.start_action("kernels", run, resumes=False)
