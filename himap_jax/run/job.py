"""One run, from its configuration to its exit status."""

import contextlib
import dataclasses
import pathlib
import sys
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

import jax
from absl import logging
from PIL import Image

from checkpoints_convert.messages import first_line
from himap_jax.engine import processes, sharding
from himap_jax.engine.accounting import method_inputs, model_sizes
from himap_jax.engine.batching import MAX_IMAGE_BUCKETS, Batcher
from himap_jax.errors import UserError
from himap_jax.generation import make_batcher
from himap_jax.pruning.schedule import Schedule
from himap_jax.run import command, flag_values
from himap_jax.run.answering import Answerer
from himap_jax.run.config import RunConfig
from himap_jax.run.contract import Contract, schedule_settings
from himap_jax.run.drawing import saved_digest
from himap_jax.run.output import Output
from himap_jax.run.picture_sizes import image_sizes
from himap_jax.run.pictures import PictureFiles
from himap_jax.run.prompts import Prompt, read_prompts
from himap_jax.run.records import open_records
from himap_jax.run.summary import Report, Summary
from himap_jax.run.user_errors import user_error

_OUTPUT_FILES = ("", ".jsonl", ".settings.json", ".partial", ".jsonl.partial")  # suffixes of what a run writes
_OTHER_TABLES = (".csv", ".tsv", ".arrow", ".feather", ".xls", ".xlsx")  # suffixes that an output cannot have


def run(config: RunConfig) -> int:
  """Runs to the end and returns the exit status.

  Raises:
    UserError, CheckpointError: the run cannot start or continue; rows written before are complete.
    JaxRuntimeError: another process of the run ended; rows written before are complete.
  """
  _check_paths(config)
  prompts = read_prompts(open_records(config.prompts, config.split), config.columns)
  command.use_compilation_cache(config.compilation_cache_dir)
  try:
    jax.devices()
  except RuntimeError as error:
    raise UserError(f"JAX finds no devices: {first_line(error)}") from error
  logging.info("ready: devices")
  if not processes.is_equal(ascii([list(prompts.keys), config.inputs, config.mesh])):
    raise UserError("the processes of this run have different prompts or flags; give all of them the same")
  opened = config.open()
  flag_values.check_outside("output", config.output, opened.directory, "the directory of the checkpoint")
  weights = opened.digest()
  logging.info("ready: checkpoint")
  processor = opened.prompts(config.inputs.prompt_template, config.inputs.max_image_tokens)
  any_prompt = processor.prepare([Image.new("RGB", (64, 64))], "?")  # what is wrong with every prompt is said once
  if config.pictures is not None or "patches" in config.emit:
    processor.views(any_prompt)
  schedule = config.pruning.schedule(**method_inputs(opened.config))
  files = PictureFiles(config.image_dir, config.allow_urls)
  sizes = image_sizes(prompts, files, processor)
  buckets, max_new_tokens = config.inputs.prompt_buckets, config.generation.max_new_tokens
  batcher = make_batcher(opened, processor, sizes, buckets, max_new_tokens, schedule)
  if processes.is_leader() and prompts.ignored:
    print(
      f"ignored prompt fields: {', '.join(textwrap.shorten(name, 40, placeholder='…') for name in prompts.ignored)}",
      file=sys.stderr,
    )
  if processes.is_leader() and len(sizes) > 1:
    print(f"image tokens: {describe_buckets(batcher)}", file=sys.stderr)
  mesh = config.make_mesh(opened)
  share = processes.share(mesh)
  contract = Contract(config.output, settings(config, schedule, weights), prompts, files)
  with Output(contract, resume=config.resume) as output:
    if processes.is_leader():
      print(f"mesh: {sharding.describe(opened.config, mesh)}", file=sys.stderr)
    if config.pictures is not None and processes.is_leader():
      _tell_missing_pictures(config.pictures, prompts.where(output.answered), contract)
    if output.answered.all():
      engine, summary = None, Summary(num_skipped=len(prompts))
    else:
      engine = config.restore(opened, mesh).engine(
        schedule, config.generation, config.inputs.batch_sizes(int((~output.answered).sum())).at_most(len(prompts))
      )
      opened.check_unchanged(weights)
      logging.info("ready: weights")
      answerer = Answerer(processor, batcher, engine, config.emit, config.pictures)
      with _profile(config.profile_dir):
        summary = answerer.answer_all(output, share)
  if processes.is_leader():
    sizes = model_sizes(opened.config, processor.blank.images.pixels.shape[2:])
    report = Report(config.pruning.label, schedule, sizes, mesh.size)
    report.show(summary, engine)
  return int(summary.is_all_errors or (config.strict and summary.num_errors > 0))


@contextlib.contextmanager
def _profile(directory: pathlib.Path | None) -> Iterator[None]:
  if directory is None:
    yield
    return
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0  # it would slow down the host, and the devices would wait for it
  with jax.profiler.trace(directory, profiler_options=options):
    yield


def describe_buckets(batcher: Batcher) -> str:
  """The numbers of image tokens to which prompts are padded, or how many shapes there are where a method cannot pad."""
  shapes = {bucket[:2] for bucket in batcher.buckets}
  counts = dict.fromkeys((bucket.num_image_tokens, bucket.is_ragged) for bucket in batcher.buckets)
  if len(shapes) > 1 + MAX_IMAGE_BUCKETS:
    least, most = (choose(count for count, _ in counts if count) for choose in (min, max))
    return f"from {least} to {most} in {len(shapes)} shapes, each with programs of its own, since the method pads none"
  return ", ".join(f"up to {count}" if is_ragged else str(count) for count, is_ragged in counts)


def settings(config: RunConfig, schedule: Schedule, weights: str) -> dict[str, Any]:
  """Everything that answers depend on besides the prompts; `weights` is the checkpoint's digest."""
  return {
    "checkpoint": weights,
    "method": config.pruning.method,
    **schedule_settings(schedule),
    **dataclasses.asdict(config.generation),
    "prompt_template": config.inputs.prompt_template,
    "max_image_tokens": config.inputs.max_image_tokens,
    "image_aspect_ratio": config.image_aspect_ratio,
    "dtype": config.dtype,
    "int8_weights": config.int8_weights,
    "emit": sorted(config.emit),
  }


def _tell_missing_pictures(directory: pathlib.Path, answered: Iterable[Prompt], contract: Contract) -> None:
  """Says how many answered rows have no picture of kept patches, or that of other settings or another question."""

  def is_missing(prompt: Prompt) -> bool:
    digests = contract.row_digest(prompt), saved_digest(directory / f"{prompt.file_name}.png")
    own, saved = (digest.split("-")[:2] for digest in digests)  # settings and question
    return own != saved

  missing = sum(is_missing(prompt) for prompt in answered if prompt.images)
  if missing:
    print(f"{missing} answered rows have no picture in {directory} and get none; --noresume draws all", file=sys.stderr)


def _check_paths(config: RunConfig) -> None:
  with user_error(f"cannot use --output={config.output} or --image_dir={config.image_dir}"):
    if not config.output.name or config.output.is_dir():
      raise UserError(f"--output={config.output} is a directory; name a file in it")
    if str(config.output) == "-":
      raise UserError("--output=-: rows are written to a file, from which a run continues; name one")
    if config.output.suffix.lower() in _OTHER_TABLES:
      raise UserError(f"--output={config.output}: the output is JSONL, or parquet if its name ends with .parquet")
    files = (config.output.with_name(config.output.name + suffix) for suffix in _OUTPUT_FILES)
    for path in files if config.prompts.is_file() else ():
      if path.exists() and path.samefile(config.prompts):
        raise UserError(f"--prompts={config.prompts} is the file {path}, which a run with this --output writes")
    written = {"output": config.output, "pictures": config.pictures, "profile_dir": config.profile_dir}
    for flag, path in written.items() if config.prompts.is_dir() else ():
      if path is not None:
        flag_values.check_outside(flag, path, config.prompts, f"the data set {config.prompts}")
    if not config.image_dir.is_dir():
      raise UserError(f"--image_dir={config.image_dir}: no such directory")
    if config.pictures is not None and config.pictures.resolve() == config.image_dir.resolve():
      raise UserError(f"--pictures={config.pictures} is --image_dir, whose pictures it would overwrite")
  directories = {"output": config.output.parent, "pictures": config.pictures, "profile_dir": config.profile_dir}
  for flag, directory in directories.items():
    if directory is not None:
      with user_error(f"--{flag}: cannot create the directory {directory}"):
        directory.mkdir(parents=True, exist_ok=True)
