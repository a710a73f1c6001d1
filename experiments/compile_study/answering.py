"""Static batches against slots: whole answers of mixed lengths, in the shapes of either.

A static batch is prefilled at once and decoded until its longest answer ends; slots take prefills of fewer rows whenever
enough of them are free. Both have as many rows in decoding.
"""

import pathlib
import time
from collections.abc import Iterator

import jax.numpy as jnp

from experiments.compile_study.measure import Measurement, Setting, workload
from experiments.shared.lengths import LONGEST, draw_lengths
from experiments.shared.subject import Subject
from himap_jax import checkpoint
from himap_jax.engine import programs, sharding
from himap_jax.engine.batching import in_batches
from himap_jax.engine.capacity import PROGRAMS, BatchSizes, Memory, needed
from himap_jax.engine.decoding import DecodeConfig
from himap_jax.engine.engine import Batch, GenerationConfig
from himap_jax.engine.pool import Request
from himap_jax.run import command

FORMS = ("static batches", "slots")
SLOTS_PER_ROW = 4  # of a prefill for slots


def on_this_machine(form: str, setting: Setting, cache_dir: pathlib.Path) -> Measurement:
  """Answers the workload twice, once to compile its programs, and once to time them.

  Returns the number of programs and the seconds of their compilation, the bytes of a device beside the weights while they
  run, and the seconds, tokens, and the share of slots in use, of the second time.
  """
  command.use_compilation_cache(str(cache_dir))
  opened, prompts = checkpoint.open_checkpoint(setting.checkpoint), workload(setting.num_prompts, seed=setting.seed)
  subject = Subject.load(opened, prompts, dtype=jnp.dtype(setting.dtype), inputs=setting.inputs, max_new_tokens=LONGEST)
  num_slots, is_static = setting.inputs.batch_size, form == "static batches"
  num_rows = num_slots if is_static else max(1, num_slots // SLOTS_PER_ROW)
  schedule, lengths = subject.himap(setting.prune_layers, setting.keep), draw_lengths(setting.num_prompts)
  length_of = {question.id: length for question, length in zip(prompts, lengths, strict=True)}
  generation = GenerationConfig(LONGEST, ignore_eos=True)
  engine = subject.loaded.engine(schedule, generation, BatchSizes(num_slots, num_rows))

  def batches() -> Iterator[Batch]:
    prepared = [(bucket, (question.id, example)) for question, example, bucket in subject.examples("prompts")]
    longest = max(bucket for bucket, _ in prepared)  # slots are as long for all, and so are the batches
    for _, rows in in_batches(((longest, row) for _, row in prepared), lambda bucket: num_rows):
      names, examples = zip(*rows, strict=True)
      packed = subject.batcher.pack(examples, bucket=longest, batch_size=num_rows)
      yield Batch(packed, [Request(name, length_of[name]) for name in names])

  ready = list(batches())

  def answer() -> int:
    groups = [[batch] for batch in ready] if is_static else [ready]
    return sum(len(row.tokens) for group in groups for turn in engine.answer(group) for row in turn)

  answer()
  usage = engine.usage
  before, start = (usage.row_steps, usage.slot_steps), time.perf_counter()
  num_tokens, seconds = answer(), time.perf_counter() - start
  model = subject.loaded.model
  inputs, seeds = sharding.abstract_rows(
    (ready[0].inputs, jnp.zeros(1, jnp.uint32)), sharding.mesh_of(model.params), num_rows
  )
  lowered = programs.Programs(model, schedule, DecodeConfig(LONGEST)).lower(
    inputs, seeds, programs.method_parameters(schedule), num_slots=num_slots
  )
  memory = {name: Memory.of(program.compile()) for name, program in lowered._asdict().items()}
  taken = needed(memory, sharding.device_bytes(model.params))
  return {
    "programs": engine.programs.num_programs,
    "compile": engine.programs.seconds,
    "memory": max(taken[name] for name in PROGRAMS),
    "seconds": seconds,
    "num_tokens": num_tokens,
    "in_use": (usage.row_steps - before[0]) / (usage.slot_steps - before[1]),
  }
