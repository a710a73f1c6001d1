"""The flags of `himap_jax.run`, as one frozen configuration."""

import dataclasses
import pathlib

from absl import flags

from checkpoints_convert import remote
from checkpoints_convert.source import read_json
from himap_jax import adaptive, command, hosts, methods, sharding
from himap_jax.processing import DEFAULT_BUCKETS
from himap_jax.sampling import Sampling

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
  f"The pruning method: {', '.join(methods.METHODS)}; one that acts before the decoder + one inside, as divprune+himap; or "
  f"{adaptive.METHOD}, which keeps of each picture what its question needs.",
)
_PRUNE_LAYERS = flags.DEFINE_list(
  "prune_layers", None, "Layers to prune before, e.g. 2,8, 0 being before the decoder; the method's own by default."
)
_KEEP = flags.DEFINE_list(
  "keep",
  None,
  "Image tokens to keep at each stage, e.g. 288,72 or 50%,12.5% of the image's; the method's own by default.",
)
_LADDER = flags.DEFINE_list(
  "ladder",
  list(adaptive.LADDER),
  f"For {adaptive.METHOD}: what --keep may be, the fewest first, stages joined by /, e.g. 144/36,288/72.",
)
_THRESHOLD = flags.DEFINE_float(
  "threshold",
  adaptive.THRESHOLD,
  f"For {adaptive.METHOD}: the share of the instruction's attention to the image that the kept tokens must hold.",
)
_BATCHES_TO_REGROUP = flags.DEFINE_integer(
  "batches_to_regroup", 8, f"For {adaptive.METHOD}: batches whose rows are regrouped by what they keep.", lower_bound=1
)
_SCHEDULE = flags.DEFINE_string(
  "schedule",
  None,
  "A JSON file with method, prune_layers and keep, as experiments.calibrate writes it, in place of these flags.",
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
  ladder: tuple[tuple[int | float, ...], ...]
  threshold: float
  batches_to_regroup: int
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
  method, prune_layers, keep = _schedule()
  if method == adaptive.METHOD:
    if keep is not None:
      raise ValueError(f"--method={method} takes --ladder in place of --keep")
  else:
    methods.parse(method)
  unknown = sorted(set(_EMIT.value) - set(EMIT))
  if unknown:
    raise ValueError(f"--emit: unknown {', '.join(unknown)}; known: {', '.join(EMIT)}")
  return RunConfig(
    checkpoint=_CHECKPOINT.value,
    prompts=pathlib.Path(_PROMPTS.value),
    image_dir=pathlib.Path(_IMAGE_DIR.value),
    output=pathlib.Path(_OUTPUT.value),
    pictures=pathlib.Path(_PICTURES.value) if _PICTURES.value else None,
    method=method,
    prune_layers=prune_layers,
    keep=keep,
    ladder=command.ladder(_LADDER),
    threshold=_THRESHOLD.value,
    batches_to_regroup=_BATCHES_TO_REGROUP.value,
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


def _schedule() -> tuple[str, tuple[int, ...] | None, tuple[int | float, ...] | None]:
  """Method, layers and keep counts, from their flags or from a file."""
  given = (_METHOD, _PRUNE_LAYERS, _KEEP)
  if _SCHEDULE.value is None:
    return _METHOD.value, command.numbers(_PRUNE_LAYERS, int), command.numbers(_KEEP, command.keep_count)
  for flag in given:
    if flag.present:
      raise ValueError(f"--schedule={_SCHEDULE.value} takes the place of --{flag.name}")
  fields = read_json(pathlib.Path(_SCHEDULE.value))
  try:
    method, *lists = (fields[flag.name] for flag in given)
    layers, keep = (tuple(map(int, values)) for values in lists)
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f"--schedule={_SCHEDULE.value}: not an object with method, prune_layers and keep, as experiments.calibrate writes it"
    ) from error
  return str(method), layers, keep


def join_processes() -> None:
  """Joins the other processes that the flags name; see `hosts.initialize`."""
  hosts.initialize(
    from_environment=_DISTRIBUTED.value,
    coordinator=_COORDINATOR.value,
    num_processes=_NUM_PROCESSES.value,
    process_id=_PROCESS_ID.value,
  )
