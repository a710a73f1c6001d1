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

from checkpoints_convert import remote
from checkpoints_convert.source import write_json
from himap_jax import checkpoint, command, hosts, inference, methods, report, sharding, shards
from himap_jax.generation import Generator
from himap_jax.hosts import Share
from himap_jax.output import OutputWriter, answered_ids
from himap_jax.processing import DEFAULT_BUCKETS, Processor
from himap_jax.prompts import Prompt, RowError, read_prompts
from himap_jax.sampling import Sampling
from himap_jax.schedule import Schedule

EMIT = ("tokens", "kept", "logits", "timing")

_CHECKPOINT = flags.DEFINE_string(
  "checkpoint",
  "demo",
  "`demo`, a directory in the Hugging Face layout, a hub id such as llava-hf/llava-1.5-7b-hf, "
  "or a directory that checkpoints_convert wrote, also gs://bucket/name.",
)
_PROMPTS = flags.DEFINE_string(
  "prompts", None, 'JSONL with {"id", "image", "question"} a line, or LLaVA\'s {"question_id", "image", "text"}.'
)
_IMAGE_DIR = flags.DEFINE_string("image_dir", ".", "Where the images are; absolute paths in a row work too.")
_OUTPUT = flags.DEFINE_string("output", None, "JSONL to write: id, answer and error of every prompt, in any order.")
_PICTURES = flags.DEFINE_string(
  "pictures", None, "Directory for a picture per prompt of the patches kept at each stage."
)
_METHOD = flags.DEFINE_string(
  "method",
  "himap",
  f"The pruning method: {', '.join(methods.METHODS)}; or one that acts before the decoder + one inside, as divprune+himap.",
)
_PRUNE_LAYERS = flags.DEFINE_list(
  "prune_layers", None, "Layers to prune before, e.g. 2,8, 0 being before the decoder; the method's own by default."
)
_KEEP = flags.DEFINE_list(
  "keep",
  None,
  "Image tokens to keep at each stage, e.g. 288,72 or 50%,12.5% of the image's; the method's own by default.",
)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 32, "The longest answer, in tokens.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "Of sampling; 0 is greedy.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Sample from the likeliest tokens that together have this probability.")
_SEED = flags.DEFINE_integer("seed", 0, "Of sampling, and of what the method random keeps.")
_IGNORE_EOS = flags.DEFINE_bool("ignore_eos", False, "Go on to max_new_tokens whatever comes.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Rows per batch.")
_PROMPT_BUCKETS = flags.DEFINE_list(
  "prompt_buckets",
  [str(bucket) for bucket in DEFAULT_BUCKETS],
  "Padded text lengths, in tokens; each is compiled once, when first needed. The longest that the model's context "
  "allows is always among them.",
)
_PROMPT_TEMPLATE = flags.DEFINE_string(
  "prompt_template", "chat", "vicuna_v1, chat (the checkpoint's own), or a text with <image> and {question}."
)
_DTYPE = flags.DEFINE_enum(
  "dtype", "bfloat16", sorted(command.DTYPES), "Of parameters and activations; products accumulate in float32."
)
_INT8_WEIGHTS = flags.DEFINE_bool(
  "int8_weights",
  False,
  "Decoder weights as int8, a scale for every output feature: half the memory, faster decoding.",
)
_EMIT = flags.DEFINE_list(
  "emit", [], f"Any of {', '.join(EMIT)}: adds token_ids, kept, first_logits, timing to every row."
)
_RESUME = flags.DEFINE_bool(
  "resume", True, "Skip prompts that the output already answers; rows with an error are tried again."
)
_MESH = flags.DEFINE_list(
  "mesh",
  None,
  "Devices as data:4,tensor:2: rows over data; heads, feed-forward and vocabulary over tensor. Chosen from the number of "
  "devices and the size of the weights by default, and printed.",
)
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed",
  False,
  "Join the processes that JAX finds by itself, on a Cloud TPU slice of several hosts or in SLURM.",
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "host:port of the first of several processes; start the same command in each."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", lower_bound=0)
_STRICT = flags.DEFINE_bool("strict", False, "Exit with a non-zero status when a row has an error.")
_PROFILE_DIR = flags.DEFINE_string(
  "profile_dir",
  None,
  "Directory for a JAX profiler trace of the batches, for TensorBoard or Perfetto; use few prompts.",
)
_COMPILATION_CACHE_DIR = flags.DEFINE_string(
  "compilation_cache_dir",
  None,
  "JAX's persistent compilation cache; in the user's cache folder by default, off when empty.",
)


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """A run, as the flags give it; the names and meanings are the flags'."""

  checkpoint: str
  prompts: pathlib.Path
  image_dir: pathlib.Path
  output: pathlib.Path
  pictures: pathlib.Path | None
  method: str
  prune_layers: tuple[int, ...] | None
  keep: tuple[int | float, ...] | None
  max_new_tokens: int
  sampling: Sampling
  seed: int
  ignore_eos: bool
  batch_size: int
  prompt_buckets: tuple[int, ...]
  prompt_template: str
  dtype: str
  int8_weights: bool
  emit: frozenset[str]
  resume: bool
  strict: bool
  profile_dir: pathlib.Path | None
  mesh: dict[str, int] | None
  compilation_cache_dir: str


def config_from_flags() -> RunConfig:
  """Reads and checks the flags.

  Raises:
    ValueError: a flag that is missing, malformed or contradicts another.
  """
  for flag in (_PROMPTS, _OUTPUT):
    if not flag.value:
      raise ValueError(f"--{flag.name} is required; see --help")
  for flag in (_PROMPTS, _IMAGE_DIR, _OUTPUT, _PICTURES, _PROFILE_DIR):
    if flag.value and remote.is_remote(flag.value):
      raise ValueError(
        f"--{flag.name}={flag.value}: only --checkpoint may be a URL; mount the bucket (gcsfuse) and name its path"
      )
  if _BATCH_SIZE.value < 1:
    raise ValueError(f"--batch_size must be at least 1, but is {_BATCH_SIZE.value}")
  if _MAX_NEW_TOKENS.value < 1:
    raise ValueError(f"--max_new_tokens must be at least 1, but is {_MAX_NEW_TOKENS.value}")
  methods.parse(_METHOD.value)
  unknown = sorted(set(_EMIT.value) - set(EMIT))
  if unknown:
    raise ValueError(f"--emit: unknown {', '.join(unknown)}; known: {', '.join(EMIT)}")
  return RunConfig(
    checkpoint=_CHECKPOINT.value,
    prompts=pathlib.Path(_PROMPTS.value),
    image_dir=pathlib.Path(_IMAGE_DIR.value),
    output=pathlib.Path(_OUTPUT.value),
    pictures=pathlib.Path(_PICTURES.value) if _PICTURES.value else None,
    method=_METHOD.value,
    prune_layers=command.numbers(_PRUNE_LAYERS, int),
    keep=command.numbers(_KEEP, command.keep_count),
    max_new_tokens=_MAX_NEW_TOKENS.value,
    sampling=Sampling(_TEMPERATURE.value, _TOP_P.value),
    seed=_SEED.value,
    ignore_eos=_IGNORE_EOS.value,
    batch_size=_BATCH_SIZE.value,
    prompt_buckets=command.numbers(_PROMPT_BUCKETS, int) or (),
    prompt_template=_PROMPT_TEMPLATE.value,
    dtype=_DTYPE.value,
    int8_weights=_INT8_WEIGHTS.value,
    emit=frozenset(_EMIT.value),
    resume=_RESUME.value,
    strict=_STRICT.value,
    profile_dir=pathlib.Path(_PROFILE_DIR.value) if _PROFILE_DIR.value else None,
    mesh=sharding.parse_mesh(_MESH.value) if _MESH.value else None,
    compilation_cache_dir=command.compilation_cache_dir(_COMPILATION_CACHE_DIR.value),
  )


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


def _settings(config: RunConfig, schedule: Schedule) -> dict[str, Any]:
  """What the rows of an output depend on, beside the prompts."""
  names = ("checkpoint", "method", "max_new_tokens", "seed", "ignore_eos", "prompt_template", "dtype", "int8_weights")
  return {name: getattr(config, name) for name in names} | {
    "sampling": dataclasses.asdict(config.sampling),
    "emit": sorted(config.emit),
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
  schedule = methods.build_schedule(
    config.method,
    num_layers=opened.config.text.num_hidden_layers,
    num_image_tokens=processor.num_image_tokens,
    has_class_token=opened.config.vision.has_class_token,
    prune_layers=config.prune_layers,
    keep=config.keep,
  )
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
    generator = Generator(
      loaded,
      schedule,
      max_new_tokens=config.max_new_tokens,
      sampling=config.sampling,
      seed=config.seed,
      ignore_eos=config.ignore_eos,
    )
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
        batch_size=sharding.padded_batch_size(config.batch_size, mesh) // share.count,
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
    hosts.initialize(
      from_environment=_DISTRIBUTED.value,
      coordinator=_COORDINATOR.value,
      num_processes=_NUM_PROCESSES.value,
      process_id=_PROCESS_ID.value,
    )
    try:
      return run(config_from_flags())
    except jax.errors.JaxRuntimeError as error:
      if jax.process_count() > 1:
        hosts.give_up("himap_jax", error)
      raise

  command.execute("himap_jax", argv, action, resumes=_RESUME.value)


if __name__ == "__main__":
  app.run(main)
