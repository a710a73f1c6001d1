"""Measures variants with an empty compilation cache, then in turns with a filled one, and compiles them for a TPU."""

import concurrent.futures
import dataclasses
import functools
import itertools
import multiprocessing
import pathlib
import shutil
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.compile_study import workload
from experiments.compile_study.recorder import Recorder
from experiments.compile_study.variants import VARIANTS
from experiments.shared import compiler_report, geometries, kept, planned
from himap_jax import checkpoint
from himap_jax.engine.batching import Batcher
from himap_jax.generation import InputConfig
from himap_jax.inputs import Inputs
from himap_jax.run import command
from himap_jax.run.progress import Progress

Measurement = dict[str, Any]
STEPS = 5  # repetitions of a step; the median counts


@dataclasses.dataclass(frozen=True)
class Setting:
  """Settings shared by all variants; the other fields are as in `himap_jax.run`.

  Attributes:
    num_prompts: prompts in the workload.
    seed: seed of the workload.
    prune_layers: HiMAP's layers; the default if None.
    keep: HiMAP's keep counts; the default if None.
  """

  checkpoint: str
  dtype: str
  num_prompts: int
  inputs: InputConfig
  seed: int
  prune_layers: tuple[int, ...] | None = None
  keep: tuple[int | float, ...] | None = None


def in_own_process(variant: str, setting: Setting, cache_dir: pathlib.Path) -> Measurement:
  """`on_this_machine` in a new process."""
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as executor:
    return executor.submit(on_this_machine, variant, setting, cache_dir).result()


def on_this_machine(variant: str, setting: Setting, cache_dir: pathlib.Path) -> Measurement:
  """Runs the workload once to compile its programs, and once to time them.

  Returns the recorder's account, the seconds of the first batch (`step_seconds`) and of the whole workload
  (`mix_seconds`) without compilation, and the tokens and slots of its batches.
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


def for_tpu(
  variant: str, *, geometry: str, topology: str, tensor: int, batch_size: int, num_text_slots: int
) -> Measurement:
  """Compiles a variant from shapes alone for an absent TPU; errors as in `planned.mesh_of`.

  Args:
    variant: a key of `VARIANTS`.
    geometry: a key of `geometries.GEOMETRIES`.
    topology: a TPU slice such as `v5e:2x4`.
    tensor: devices that share the heads; other devices hold different rows.
    batch_size: rows of the whole slice.
    num_text_slots: padded text length.

  Returns:
    The recorder's account, and descriptions of all collectives and of those in pruning stages.
  """
  shape = {"batch_size": batch_size, "num_text_slots": num_text_slots}
  model, inputs, _ = planned.shapes_on(planned.mesh_of(topology, tensor), geometry, **shape)
  recorder = Recorder(is_abstract=True)
  VARIANTS[variant].build(recorder, geometries.schedule_of(geometries.model_of(geometry), "himap"))(model, inputs)
  found = [one for program in recorder.compiled for one in compiler_report.collectives(program)]
  return {
    **recorder.account(),
    "collectives": compiler_report.summarize(found),
    "selecting": compiler_report.summarize(one for one in found if "prune_before_layer_" in one.scope),
  }


def run(
  variants: Sequence[str], setting: Setting, place: dict[str, Any], *, turns: int, workdir: pathlib.Path
) -> tuple[dict[str, list[Measurement]], dict[str, Measurement]]:
  """Measures variants and compiles them for a TPU; resumes from the work directory.

  Args:
    variants: keys of `VARIANTS`.
    setting: settings of all variants.
    place: arguments of `for_tpu`; nothing is compiled for a TPU if empty.
    turns: measurements of every variant after the first.
    workdir: directory of measurements and compilation caches.

  Returns:
    By variant, its measurements, the first with an empty compilation cache and the others with a filled one; and by
    variant its measurement for a TPU.
  """

  def measured(name: str, turn: int) -> Measurement:
    cache = workdir / "compiled" / name
    if turn == 0:
      shutil.rmtree(cache, ignore_errors=True)
    return in_own_process(name, setting, cache)

  processes: dict[str, list[Measurement]] = {name: [] for name in variants}
  steps = list(itertools.product(range(turns + 1), variants))
  with Progress(len(steps), "process", "measuring") as progress:
    for turn, name in steps:
      processes[name].append(kept.json_of(workdir / f"{name}-{turn}.json", measured, name, turn))
      progress.update()
  if not place:
    return processes, {}
  reported = [name for name in variants if VARIANTS[name].can_be_abstract and VARIANTS[name].is_bucketed]
  tpu = {}
  with Progress(len(reported), "variant", "compiling for TPU") as progress:
    for name in reported:
      tpu[name] = kept.json_of(workdir / f"{name}-tpu.json", functools.partial(for_tpu, name, **place))
      progress.update()
  return processes, tpu
