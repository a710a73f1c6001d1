"""Answers a file of questions about images.

    python -m himap_jax.run --flagfile=experiments/flags/demo.flags

Reads prompts, writes one JSON row per prompt as batches finish, resumes where an earlier run stopped.
"""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before transformers is imported anywhere

import contextlib
import dataclasses
import math
import pathlib
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
from absl import app, flags, logging

from checkpoints_convert.source import write_json
from himap_jax import adaptive, checkpoint, command, hosts, inference, methods, report, run_config, sharding, shards
from himap_jax.adaptive import Ladder
from himap_jax.adaptive_generation import AdaptiveGenerator
from himap_jax.generation import Generator
from himap_jax.hosts import Share
from himap_jax.output import OutputWriter, answered_ids
from himap_jax.processing import Processor
from himap_jax.prompts import Prompt, RowError, read_prompts
from himap_jax.run_config import RunConfig, config_from_flags, join_processes
from himap_jax.schedule import Schedule

flags.adopt_module_key_flags(run_config)  # for --help


def _make_directory(flag: str, directory: pathlib.Path) -> None:
  try:
    directory.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ValueError(f"--{flag}: cannot make the directory {directory}: {error.strerror}") from error


@contextlib.contextmanager
def _open_writer(path: pathlib.Path, *, resume: bool, retry: Collection[str | int]) -> Iterator[OutputWriter]:
  """Holds an output file; one made for a run that wrote no row is removed again."""
  existed = path.exists()
  with OutputWriter(path, resume=resume, retry=retry) as writer:
    try:
      yield writer
    finally:
      if not existed and not path.stat().st_size:
        path.unlink()


def _schedule(config: RunConfig, opened: checkpoint.OpenCheckpoint, processor: Processor) -> Schedule | Ladder:
  """What becomes of the image tokens: the same in every row, or as its question needs."""
  num_layers, num_image_tokens = opened.config.text.num_hidden_layers, processor.num_image_tokens
  if config.method == adaptive.METHOD:
    if jax.process_count() > 1:
      raise ValueError(f"--method={adaptive.METHOD} regroups rows of all devices, and so runs in one process")
    return adaptive.build_ladder(
      num_layers=num_layers,
      num_image_tokens=num_image_tokens,
      prune_layers=config.prune_layers,
      keeps=config.ladder,
      threshold=config.threshold,
    )
  return methods.build_schedule(
    config.method,
    num_layers=num_layers,
    num_image_tokens=num_image_tokens,
    has_class_token=opened.config.vision.has_class_token,
    prune_layers=config.prune_layers,
    keep=config.keep,
  )


def _settings(config: RunConfig, schedule: Schedule | Ladder) -> dict[str, Any]:
  """What the rows of an output depend on, beside the prompts."""
  names = ("checkpoint", "method", "max_new_tokens", "seed", "ignore_eos", "prompt_template", "dtype", "int8_weights")
  return {name: getattr(config, name) for name in names} | {
    "sampling": dataclasses.asdict(config.sampling),
    "emit": sorted(config.emit),
    **_settings_of_schedule(schedule),
  }


def _settings_of_schedule(schedule: Schedule | Ladder) -> dict[str, Any]:
  if isinstance(schedule, Ladder):
    rungs = [_settings_of_schedule(rung) for rung in schedule.rungs]
    return rungs[0] | {"keep": [rung["keep"] for rung in rungs], "threshold": schedule.threshold}
  return {
    "prune_layers": [*schedule.frozen_layers, *(stage.layer for stage in schedule.stages)],
    "keep": [stage.keep for stage in schedule.stages],
  }


def run(config: RunConfig) -> int:
  """Runs to the end and returns the exit status.

  Raises:
    ValueError: the configuration cannot be run; no row was written.
    OSError: the output or a picture cannot be written; the rows written before are whole.
    RuntimeError: another process of the run ended; the rows written before are whole.
  """
  prompts = read_prompts(config.prompts)
  if config.output.exists() and config.output.samefile(config.prompts):
    raise ValueError("--output is the same file as --prompts")
  if not config.image_dir.is_dir():
    raise ValueError(f"--image_dir={config.image_dir}: no such directory")
  _make_directory("output", config.output.parent)
  if config.pictures is not None:
    _make_directory("pictures", config.pictures)
  if config.profile_dir is not None:
    _make_directory("profile_dir", config.profile_dir)
  command.use_compilation_cache(config.compilation_cache_dir)
  jax.devices()
  logging.info("ready: devices")
  if hosts.is_leader():
    if config.resume:
      shards.merge(config.output)
    else:
      shards.remove(config.output)
  hosts.wait_for_all("output")
  retry = {prompt.id for prompt in prompts}
  if jax.process_count() == 1:
    with _open_writer(config.output, resume=config.resume, retry=retry) as writer:
      summary = _answer(config, prompts, writer.answered, lambda share: contextlib.nullcontext(writer))
  else:

    def open_shard(share: Share) -> contextlib.AbstractContextManager[OutputWriter | None]:
      path = shards.path(config.output, share)
      return _open_writer(path, resume=True, retry=()) if share.is_written_here else contextlib.nullcontext()

    answered = answered_ids(config.output, retry=retry) if config.resume else set()
    summary = _answer(config, prompts, answered, open_shard)
    hosts.wait_for_all("answered")
    if hosts.is_leader():
      shards.merge(config.output, replace=not config.resume)
    hosts.wait_for_all("merged")
  return 1 if config.strict and summary.num_errors else 0


def _answer(
  config: RunConfig,
  prompts: Sequence[Prompt | RowError],
  answered: Collection[str | int],
  open_writer: Callable[[Share], contextlib.AbstractContextManager[OutputWriter | None]],
) -> inference.Summary:
  """Opens the model and answers what has no answer; the summary is that of all processes."""
  opened = checkpoint.open_checkpoint(config.checkpoint)
  logging.info("ready: checkpoint")
  processor = Processor(
    opened.processor,
    opened.config,
    template=config.prompt_template,
    buckets=config.prompt_buckets,
    max_new_tokens=config.max_new_tokens,
  )
  if config.pictures is not None and processor.num_image_tokens != math.prod(processor.patch_grid):
    raise ValueError(
      f"--pictures: this model's {processor.num_image_tokens} image tokens are not its grid of "
      f"{' x '.join(map(str, processor.patch_grid))} patches"
    )
  schedule = _schedule(config, opened, processor)
  dtype = command.DTYPES[config.dtype]
  num_bytes = opened.num_bytes(dtype, quantize_decoder=config.int8_weights)
  mesh = sharding.make_mesh(**(config.mesh or sharding.choose_mesh(opened.config, num_bytes, config.batch_size)))
  share = hosts.share(mesh)
  with open_writer(share) as writer:
    settings = _settings(config, schedule)
    settings_path = config.output.with_name(f"{config.output.name}.settings.json")
    if answered:
      command.hold_to_settings(settings_path, settings, "use another --output, or --noresume to replace it")
    if hosts.is_leader():
      print(f"mesh: {sharding.describe(opened.config, mesh)}", file=sys.stderr)
    loaded = opened.restore(dtype=dtype, mesh=mesh, quantize_decoder=config.int8_weights)
    batch_size = sharding.padded_batch_size(config.batch_size, mesh)
    rows_at_once = batch_size // share.count
    options = {
      "max_new_tokens": config.max_new_tokens,
      "sampling": config.sampling,
      "seed": config.seed,
      "ignore_eos": config.ignore_eos,
    }
    if isinstance(schedule, Ladder):
      rows_at_once = batch_size * config.batches_to_regroup
      generator = AdaptiveGenerator(
        loaded, schedule, batch_size=batch_size, num_batches=config.batches_to_regroup, **options
      )
    else:
      generator = Generator(loaded, schedule, **options)
    logging.info("ready: weights")
    if not answered and hosts.is_leader():
      write_json(settings_path, settings)
    with contextlib.nullcontext() if config.profile_dir is None else jax.profiler.trace(config.profile_dir):
      summary = inference.answer_all(
        prompts,
        processor,
        generator,
        writer,
        answered=answered,
        image_dir=config.image_dir,
        rows_at_once=rows_at_once,
        multiple=batch_size // share.count,
        emit=config.emit,
        pictures=config.pictures,
        share=share,
      )
  summary = inference.of_all(summary, share)
  if hosts.is_leader():
    report.print_summary(
      summary, generator, schedule, opened.config, processor, method=config.method, num_devices=mesh.size
    )
  return summary


def main(argv: Sequence[str]) -> None:
  """Runs the command and exits with its status."""

  def action() -> int:
    join_processes()
    try:
      return run(config_from_flags())
    except jax.errors.JaxRuntimeError as error:
      if jax.process_count() > 1:
        hosts.give_up("himap_jax", error)
      raise

  command.execute("himap_jax", argv, action, resumes=flags.FLAGS.resume)


if __name__ == "__main__":
  app.run(main)
