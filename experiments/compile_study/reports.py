"""What the TPU's compiler says of the variants, from shapes alone."""

import dataclasses

from experiments.compile_study.recorder import Account, Recorder
from experiments.compile_study.variants import VARIANTS
from experiments.shared import compiler_report, geometries, planned


@dataclasses.dataclass(frozen=True)
class Place:
  """Where and what is compiled.

  Attributes:
    geometry: a key of `geometries.GEOMETRIES`.
    topology: of a TPU slice, as `v5e:2x4`.
    tensor: devices that share the heads; the others have rows of their own.
    batch_size: rows of all devices.
    num_text_slots: padded text length.
  """

  geometry: str
  topology: str
  tensor: int
  batch_size: int
  num_text_slots: int


@dataclasses.dataclass(frozen=True)
class Report(Account):
  """The compiler's account of a variant's programs, with their collectives.

  Attributes:
    collectives: of all of them, in words.
    selecting_collectives: those of the pruning stages alone, in words.
  """

  collectives: str
  selecting_collectives: str


def report(variant: str, place: Place) -> Report:
  """Compiles a variant for a TPU that is not there; errors as in `planned.mesh_of`."""
  model, inputs, _ = planned.shapes_on(
    planned.mesh_of(place.topology, place.tensor),
    place.geometry,
    batch_size=place.batch_size,
    num_text_slots=place.num_text_slots,
  )
  recorder = Recorder(is_abstract=True)
  schedule = geometries.schedule_of(geometries.model_of(place.geometry), "himap")
  VARIANTS[variant].build(recorder, schedule)(model, inputs)
  found = [one for program in recorder.compiled for one in compiler_report.collectives(program)]
  return Report(
    **dataclasses.asdict(recorder.account()),
    collectives=compiler_report.summarize(found),
    selecting_collectives=compiler_report.summarize(one for one in found if "prune_before_layer_" in one.scope),
  )
