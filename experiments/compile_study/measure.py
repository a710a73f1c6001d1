"""Measures one variant in a process of its own: what it compiles, and how long the workload takes."""

import concurrent.futures
import dataclasses
import multiprocessing
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp

from experiments.compile_study import workload
from experiments.compile_study.recorder import Recorder
from experiments.compile_study.variants import VARIANTS
from himap_jax import attention, checkpoint, command, sharding
from himap_jax.llava import Llava
from himap_jax.methods import build_schedule
from himap_jax.processing import Processor

STEPS = 5  # of which the median counts


@dataclasses.dataclass(frozen=True)
class Setting:
  """What every variant is measured with.

  Attributes:
    checkpoint: as in `himap_jax.run`.
    dtype: of parameters and activations.
    num_prompts: of the workload.
    batch_size: rows of a batch.
    buckets: padded text lengths.
    seed: of the workload.
    prune_layers: HiMAP's layers; its own when None.
    keep: what it keeps; its own when None.
  """

  checkpoint: str
  dtype: str
  num_prompts: int
  batch_size: int
  buckets: tuple[int, ...]
  seed: int
  prune_layers: tuple[int, ...] | None = None
  keep: tuple[int | float, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Measurement:
  """One process's figures.

  Attributes:
    num_programs: compiled for the workload.
    compile_seconds: of all of them, or to read them from the persistent cache.
    num_instructions: of all of them, after optimisation.
    temporaries: bytes of the program that takes the most.
    step_seconds: of the first batch.
    mix_seconds: of the whole workload, once everything is compiled.
    num_tokens: of its prompts.
    num_slots: of its batches.
  """

  num_programs: int
  compile_seconds: float
  num_instructions: int
  temporaries: int
  step_seconds: float
  mix_seconds: float
  num_tokens: int
  num_slots: int


def in_own_process(variant: str, setting: Setting, cache_dir: pathlib.Path) -> Measurement:
  """`measure` in a new process, which finds nothing in memory."""
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as executor:
    return executor.submit(measure, variant, setting, cache_dir).result()


def measure(variant: str, setting: Setting, cache_dir: pathlib.Path) -> Measurement:
  """Runs the workload once to compile what it needs, and once for its time."""
  command.use_compilation_cache(str(cache_dir))
  dtype = jnp.dtype(setting.dtype)
  loaded = checkpoint.load(setting.checkpoint, dtype=dtype)
  config = loaded.config
  processor = Processor(loaded.processor, config, buckets=setting.buckets)
  schedule = build_schedule(
    "himap",
    num_layers=config.text.num_hidden_layers,
    num_image_tokens=processor.num_image_tokens,
    has_class_token=config.vision.has_class_token,
    prune_layers=setting.prune_layers,
    keep=setting.keep,
  )
  examples = workload.make_examples(processor, setting.num_prompts, seed=setting.seed)
  batches = workload.make_batches(processor, examples, setting.batch_size, is_bucketed=VARIANTS[variant].is_bucketed)
  batches = jax.tree.map(jnp.asarray, batches)
  recorder = Recorder()
  prefill = VARIANTS[variant].build(recorder, Llava(config, dtype, attention.for_mesh(sharding.make_mesh())), schedule)

  def seconds(inputs: list) -> float:
    start = time.perf_counter()
    for batch in inputs:
      jax.block_until_ready(prefill(loaded.params, batch))
    return time.perf_counter() - start

  seconds(batches)
  return Measurement(
    num_programs=len(recorder.compiled),
    compile_seconds=recorder.seconds,
    num_instructions=recorder.num_instructions,
    temporaries=recorder.temporaries,
    step_seconds=statistics.median(seconds(batches[:1]) for _ in range(STEPS)),
    mix_seconds=seconds(batches),
    num_tokens=sum(example.num_text_tokens + processor.num_image_tokens for example in examples),
    num_slots=sum(batch.tokens.size for batch in batches),
  )
