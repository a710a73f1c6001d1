"""What the TPU's compiler says of the variants, from shapes alone."""

import dataclasses

import jax.numpy as jnp

from experiments import compiler_report, geometries, planned
from experiments.compile_study.recorder import Recorder
from experiments.compile_study.variants import VARIANTS
from himap_jax import attention, programs, sharding
from himap_jax.llava import Llava


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
class Report:
  """The compiler's account of a variant's programs.

  Attributes:
    num_programs: how many.
    compile_seconds: of all of them.
    num_instructions: of all of them, after optimisation.
    temporaries: bytes on one device, of the program that takes the most.
    collectives: of all of them, in words.
    selecting_collectives: those of the pruning stages alone, in words.
  """

  num_programs: int
  compile_seconds: float
  num_instructions: int
  temporaries: int
  collectives: str
  selecting_collectives: str


def report(variant: str, place: Place) -> Report:
  """Compiles a variant for a TPU that is not there.

  Raises:
    ValueError: see `planned.mesh_of`.
  """
  mesh = planned.mesh_of(place.topology, place.tensor)
  original = geometries.model_of(place.geometry)
  config = sharding.with_divisible_key_heads(original, mesh)
  inputs, _ = programs.abstract_inputs(
    config,
    mesh,
    batch_size=place.batch_size,
    num_text_slots=place.num_text_slots,
    image_shape=(config.vision.image_size,) * 2,
  )
  recorder = Recorder(is_abstract=True)
  model = Llava(config, jnp.bfloat16, attention.for_mesh(mesh))
  VARIANTS[variant].build(recorder, model, geometries.schedule_of(original, "himap"))(
    planned.params_on(mesh, config), inputs
  )
  found = [one for program in recorder.compiled for one in compiler_report.collectives(program)]
  return Report(
    num_programs=len(recorder.compiled),
    compile_seconds=recorder.seconds,
    num_instructions=recorder.num_instructions,
    temporaries=recorder.temporaries,
    collectives=compiler_report.summarize(found),
    selecting_collectives=compiler_report.summarize(one for one in found if "prune_before_layer_" in one.scope),
  )
