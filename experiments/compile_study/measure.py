"""Measures one variant: on this machine what it compiles and how long the workload takes, for a TPU what the compiler says."""

import concurrent.futures
import dataclasses
import multiprocessing
import pathlib
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from experiments.compile_study import workload
from experiments.compile_study.recorder import Recorder
from experiments.compile_study.variants import VARIANTS
from experiments.shared import compiler_report, geometries, planned
from himap_jax import checkpoint
from himap_jax.engine.batching import Batcher
from himap_jax.generation import InputConfig
from himap_jax.inputs import Inputs
from himap_jax.run import command

STEPS = 5  # of which the median counts


@dataclasses.dataclass(frozen=True)
class Setting:
  """What every variant is measured with; what is not explained is as in `himap_jax.run`.

  Attributes:
    num_prompts: of the workload.
    seed: of the workload.
    prune_layers: HiMAP's layers; its own when None.
    keep: what it keeps; its own when None.
  """

  checkpoint: str
  dtype: str
  num_prompts: int
  inputs: InputConfig
  seed: int
  prune_layers: tuple[int, ...] | None = None
  keep: tuple[int | float, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Place:
  """Where and what is compiled for TPU.

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


def in_own_process(variant: str, setting: Setting, cache_dir: pathlib.Path) -> dict[str, float]:
  """`on_this_machine` in a new process, which finds nothing in memory."""
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as executor:
    return executor.submit(on_this_machine, variant, setting, cache_dir).result()


def on_this_machine(variant: str, setting: Setting, cache_dir: pathlib.Path) -> dict[str, float]:
  """Runs the workload once to compile what it needs, and once for its time.

  Returns:
    The account of what it compiled, seconds of the first batch (`step_seconds`) and of the whole workload (`mix_seconds`) once
    everything is compiled, and the tokens and slots of its batches.
  """
  command.use_compilation_cache(str(cache_dir))
  loaded = checkpoint.load(setting.checkpoint, dtype=jnp.dtype(setting.dtype))
  processor = loaded.prompts(setting.inputs.prompt_template)
  batcher = Batcher(loaded.config, processor.image_shape, buckets=setting.inputs.prompt_buckets)
  examples = workload.make_examples(processor, setting.num_prompts, seed=setting.seed)
  is_bucketed = VARIANTS[variant].is_bucketed
  batches = workload.make_batches(batcher, examples, setting.inputs.batch_size, is_bucketed=is_bucketed)
  batches = jax.tree.map(jnp.asarray, batches)
  recorder = Recorder()
  prefill = VARIANTS[variant].build(recorder, loaded.schedule("himap", setting.prune_layers, setting.keep))

  def seconds(inputs: list[Inputs]) -> float:
    start = time.perf_counter()
    for batch in inputs:
      jax.block_until_ready(prefill(loaded.model, batch))
    return time.perf_counter() - start

  seconds(batches)
  return {
    **recorder.account(),
    "step_seconds": statistics.median(seconds(batches[:1]) for _ in range(STEPS)),
    "mix_seconds": seconds(batches),
    "num_tokens": sum(len(example.tokens) for example in examples),
    "num_slots": sum(batch.tokens.size for batch in batches),
  }


def for_tpu(variant: str, place: Place) -> dict[str, Any]:
  """Compiles a variant from shapes alone for a TPU that is not there; errors as in `planned.mesh_of`.

  Returns:
    The account of its programs, and in words their collectives and those of the pruning stages alone.
  """
  mesh = planned.mesh_of(place.topology, place.tensor)
  shape = {"batch_size": place.batch_size, "num_text_slots": place.num_text_slots}
  model, inputs, _ = planned.shapes_on(mesh, place.geometry, **shape)
  recorder = Recorder(is_abstract=True)
  VARIANTS[variant].build(recorder, geometries.schedule_of(geometries.model_of(place.geometry), "himap"))(model, inputs)
  found = [one for program in recorder.compiled for one in compiler_report.collectives(program)]
  return {
    **recorder.account(),
    "collectives": compiler_report.summarize(found),
    "selecting": compiler_report.summarize(one for one in found if "prune_before_layer_" in one.scope),
  }
