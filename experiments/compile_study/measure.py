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
from experiments.compile_study.recorder import Account, Recorder
from experiments.compile_study.variants import VARIANTS
from himap_jax import checkpoint
from himap_jax.engine.batching import Batcher
from himap_jax.generation import InputConfig
from himap_jax.inputs import Inputs
from himap_jax.run import command

STEPS = 5  # of which the median counts


@dataclasses.dataclass(frozen=True)
class Setting:
  """What every variant is measured with.

  Attributes:
    checkpoint: as in `himap_jax.run`.
    dtype: of parameters and activations.
    num_prompts: of the workload.
    inputs: how prompts are prepared.
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
class Measurement(Account):
  """One process's figures, beside the account of what it compiled for the workload.

  Attributes:
    step_seconds: of the first batch.
    mix_seconds: of the whole workload, once everything is compiled.
    num_tokens: of its prompts.
    num_slots: of its batches.
  """

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
  loaded = checkpoint.load(setting.checkpoint, dtype=jnp.dtype(setting.dtype))
  processor = loaded.prompts(setting.inputs.prompt_template)
  batcher = Batcher(loaded.config, processor.image_shape, buckets=setting.inputs.prompt_buckets)
  examples = workload.make_examples(processor, setting.num_prompts, seed=setting.seed)
  batches = workload.make_batches(
    batcher, examples, setting.inputs.batch_size, is_bucketed=VARIANTS[variant].is_bucketed
  )
  batches = jax.tree.map(jnp.asarray, batches)
  recorder = Recorder()
  prefill = VARIANTS[variant].build(recorder, loaded.schedule("himap", setting.prune_layers, setting.keep))

  def seconds(inputs: list[Inputs]) -> float:
    start = time.perf_counter()
    for batch in inputs:
      jax.block_until_ready(prefill(loaded.model, batch))
    return time.perf_counter() - start

  seconds(batches)
  return Measurement(
    **dataclasses.asdict(recorder.account()),
    step_seconds=statistics.median(seconds(batches[:1]) for _ in range(STEPS)),
    mix_seconds=seconds(batches),
    num_tokens=sum(len(example.tokens) for example in examples),
    num_slots=sum(batch.tokens.size for batch in batches),
  )
