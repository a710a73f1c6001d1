"""Measures variants on prompts of mixed lengths, with an empty and a filled compilation cache, and compiles for a TPU."""

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import multiprocessing
import pathlib
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.compile_study.recorder import Recorder
from experiments.compile_study.variants import VARIANTS
from experiments.question_sets import Question
from experiments.shared import compiler_report, geometries, kept, planned
from experiments.shared.subject import Batch, Subject
from himap_jax import checkpoint
from himap_jax.engine.batching import Bucket
from himap_jax.generation import InputConfig
from himap_jax.inputs import Inputs
from himap_jax.run import command
from himap_jax.run.progress import Progress

Measurement = dict[str, Any]
STEPS = 5  # repetitions of a step; the median counts

DEMO = pathlib.Path(__file__).parents[1] / "demo"
SPREAD = 1.0  # standard deviation of the logarithm of a prompt's number of questions
MOST_QUESTIONS = 24


@dataclasses.dataclass(frozen=True)
class Setting:
  """Settings shared by all variants, as in `himap_jax.run`."""

  checkpoint: str
  dtype: str
  num_prompts: int  # in the workload
  inputs: InputConfig
  seed: int  # of the workload
  prune_layers: tuple[int, ...] | None = None  # HiMAP's; the default if None
  keep: tuple[int | float, ...] | None = None  # HiMAP's keep counts; the default if None


# (variant, setting, compilation cache) → what was measured.
Measure = Callable[[str, Setting, pathlib.Path], Measurement]


def workload(num_prompts: int, *, seed: int) -> list[Question]:
  """Prompts about the demo's pictures; the number of questions in each is log-normal, mostly one or two."""
  rng = np.random.default_rng(seed)
  rows = [json.loads(line) for line in (DEMO / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
  counts = np.clip(np.rint(rng.lognormal(0, SPREAD, num_prompts)), 1, MOST_QUESTIONS).astype(int)
  prompts = []
  for number, count in enumerate(counts):
    text = " ".join(rows[index]["question"] for index in rng.integers(len(rows), size=count))
    prompts.append(Question(str(number), DEMO / rows[rng.integers(len(rows))]["image"], text, "", "", ""))
  return prompts


def make_batches(subject: Subject, *, is_bucketed: bool) -> list[Batch]:
  """Batches in order of arrival, of one bucket each or padded to their longest prompt."""
  if is_bucketed:
    return list(subject.batches("prompts"))
  prepared, size, batches = list(subject.examples("prompts")), subject.batch_size, []
  for first in range(0, len(prepared), size):
    questions, examples, _ = zip(*prepared[first : first + size], strict=True)
    longest = Bucket(*examples[0].size, max(example.num_text_tokens for example in examples))
    batches.append(Batch(questions, subject.batcher.pack(examples, bucket=longest, batch_size=size)))
  return batches


def in_own_process(measure: Measure, variant: str, setting: Setting, cache_dir: pathlib.Path) -> Measurement:
  """A measurement in a new process."""
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as executor:
    return executor.submit(measure, variant, setting, cache_dir).result()


def on_this_machine(variant: str, setting: Setting, cache_dir: pathlib.Path) -> Measurement:
  """Runs the workload once to compile its programs, and once to time them.

  Returns the recorder's account, the seconds of the first batch (`step_seconds`) and of the whole workload
  (`mix_seconds`) without compilation, and the tokens and slots of its batches.
  """
  command.use_compilation_cache(str(cache_dir))
  prompts = workload(setting.num_prompts, seed=setting.seed)
  opened = checkpoint.open_checkpoint(setting.checkpoint)
  subject = Subject.load(opened, prompts, dtype=jnp.dtype(setting.dtype), inputs=setting.inputs)
  batches = make_batches(subject, is_bucketed=VARIANTS[variant].is_bucketed)
  num_tokens = sum(int(batch.inputs.layout.num_tokens()[: len(batch.questions)].sum()) for batch in batches)
  inputs = jax.tree.map(jnp.asarray, [batch.inputs for batch in batches])
  recorder, loaded = Recorder(), subject.loaded
  prefill = VARIANTS[variant].build(recorder, subject.himap(setting.prune_layers, setting.keep))

  def seconds(batches: list[Inputs]) -> float:
    start = time.perf_counter()
    for batch in batches:
      jax.block_until_ready(prefill(loaded.model, batch))
    return time.perf_counter() - start

  seconds(inputs)
  return {
    **recorder.account(),
    "step_seconds": statistics.median(seconds(inputs[:1]) for _ in range(STEPS)),
    "mix_seconds": seconds(inputs),
    "num_tokens": num_tokens,
    "num_slots": sum(batch.tokens.size for batch in inputs),
  }


def for_tpu(
  variant: str, *, geometry: str, topology: str, tensor: int, batch_size: int, num_text_slots: int
) -> Measurement:
  """Compiles a variant from shapes alone for an absent TPU; errors as in `planned.mesh_of`.

  The batch is that of a whole slice such as `v5e:2x4`, in which `tensor` devices share the heads and the others hold
  different rows. Returns the recorder's account, and descriptions of all collectives and of those in pruning stages.
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


def in_turns(
  measure: Measure, variants: Sequence[str], setting: Setting, *, turns: int, workdir: pathlib.Path
) -> dict[str, list[Measurement]]:
  """The measurements of every variant; resumes from the work directory.

  The first measurement of a variant has an empty compilation cache, `turns` more have a filled one.
  """

  def measured(name: str, turn: int) -> Measurement:
    cache = workdir / "compiled" / kept.file_name(name)
    if turn == 0:
      shutil.rmtree(cache, ignore_errors=True)
    return in_own_process(measure, name, setting, cache)

  processes: dict[str, list[Measurement]] = {name: [] for name in variants}
  steps = list(itertools.product(range(turns + 1), variants))
  with Progress(len(steps), "process", "measuring") as progress:
    for turn, name in steps:
      processes[name].append(kept.json_of(workdir / f"{kept.file_name(name)}-{turn}.json", measured, name, turn))
      progress.update()
  return processes


def on_tpu(variants: Sequence[str], place: dict[str, Any], workdir: pathlib.Path) -> dict[str, Measurement]:
  """The measurements of those variants that can be compiled for an absent TPU; `place` is the arguments of `for_tpu`."""
  reported = [name for name in variants if VARIANTS[name].can_be_abstract and VARIANTS[name].is_bucketed]
  tpu = {}
  with Progress(len(reported), "variant", "compiling for TPU") as progress:
    for name in reported:
      tpu[name] = kept.json_of(workdir / f"{name}-tpu.json", functools.partial(for_tpu, name, **place))
      progress.update()
  return tpu
