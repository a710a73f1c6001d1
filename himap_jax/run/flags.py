"""The flags of `himap_jax.run`, as one frozen configuration."""

import dataclasses
import pathlib

from absl import flags

from checkpoints_convert import remote
from checkpoints_convert.source import read_json
from himap_jax import checkpoint
from himap_jax.engine import processes, sharding
from himap_jax.engine.engine import GenerationConfig
from himap_jax.engine.sampling import Sampling
from himap_jax.errors import UserError
from himap_jax.generation import InputConfig
from himap_jax.pruning import methods
from himap_jax.pruning.methods import PruningConfig
from himap_jax.run import command
from himap_jax.run.prompts import Columns

EMIT = ("tokens", "kept", "patches", "counts", "logits", "timing")

flags.DEFINE_string(
  "checkpoint",
  "demo",
  "`demo` or `demo_cross`, a directory in the Hugging Face layout, a hub id such as llava-hf/llava-1.5-7b-hf, or a "
  "directory that himap_jax.convert wrote, also gs://bucket/name.",
)
flags.DEFINE_bool(
  "allow_pickle",
  False,
  "Read pickled weights (*.bin) if a checkpoint has no safetensors: their tensors alone, no code in them is run. Needs "
  "the extra `pickled`.",
)
flags.DEFINE_string(
  "prompts",
  None,
  'JSONL with {"id", "image", "question"} a line, or LLaVA\'s {"question_id", "image", "text"}, or "messages" instead of image '
  "and question; image is a path, URL or base64, or a list of these. Or the same as .csv or .parquet, a directory of "
  "such files or that `datasets` saved, or a data set of the hub; an image may be its bytes there.",
)
flags.DEFINE_string(
  "split", None, "The split of a directory or data set, such as test, or configuration/test where it has several."
)
_COLUMNS = flags.DEFINE_list(
  "columns",
  [],
  "Names that the rows have for our fields id, image, question and messages, such as image:img,question:q,id:qid; "
  "`image:` if there are no pictures, `id:` to number the rows.",
)
flags.DEFINE_string("image_dir", ".", "Directory that relative image paths start from.")
flags.DEFINE_string(
  "output", None, "JSONL or .parquet file to write: id, answer, error and digest of every prompt, in any order."
)
flags.DEFINE_string("pictures", None, "Directory for one picture per prompt, with the patches kept at each stage.")
_METHOD = flags.DEFINE_string(
  "method",
  "himap",
  f"The pruning method: {', '.join(methods.METHODS)}; or one before the decoder + one inside, such as divprune+himap.",
)
_PRUNE_LAYERS = flags.DEFINE_list(
  "prune_layers", None, "Layers to prune before, such as 2,8; 0 is before the decoder. The method's own by default."
)
_KEEP = flags.DEFINE_list(
  "keep",
  None,
  "Image tokens to keep at each stage, such as 288,72, or shares of a row's own, such as 50%,12.5%. The method's own by default.",
)
_METHOD_PARAMETERS = flags.DEFINE_list(
  "method_parameters", None, "Parameters of the method, such as threshold:0.8. The method's own by default."
)
_SCHEDULE = flags.DEFINE_string(
  "schedule",
  None,
  "JSON file with method, prune_layers and keep instead of these flags; experiments.flow.calibrate writes one.",
)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 32, "The longest answer, in tokens.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "Sampling temperature; 0 is greedy decoding.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Sample from the smallest set of likeliest tokens with this probability.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of sampling, and of methods that choose at random.")
_IGNORE_EOS = flags.DEFINE_bool("ignore_eos", False, "Always generate max_new_tokens tokens.")
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size",
  None,
  "Rows that are decoded together: the slots. By default chosen from the memory of the devices and printed.",
)
_PREFILL_BATCH_SIZE = flags.DEFINE_integer(
  "prefill_batch_size", None, "Rows that are prefilled together. By default chosen and printed.", lower_bound=1
)
_PROMPT_BUCKETS = flags.DEFINE_list(
  "prompt_buckets",
  [str(bucket) for bucket in InputConfig().prompt_buckets],
  "Padded text lengths, in tokens; each is compiled once, when needed. The longest that fits the context is added.",
)
_MAX_IMAGE_TOKENS = flags.DEFINE_integer(
  "max_image_tokens",
  None,
  "Most image tokens of a picture, for models that choose them by its size. The checkpoint's own limit by default.",
  lower_bound=1,
)
_PROMPT_TEMPLATE = flags.DEFINE_string(
  "prompt_template", "chat", "vicuna_v1, chat (the checkpoint's own), or a text with <image> and {question}."
)
flags.DEFINE_enum(
  "image_aspect_ratio",
  "checkpoint",
  checkpoint.ASPECT_RATIOS,
  "pad: pad pictures to squares, as LLaVA-1.5 was trained and its scores were measured; checkpoint: as its processor does.",
)
flags.DEFINE_enum(
  "dtype", "bfloat16", sorted(command.DTYPES), "Dtype of parameters and activations; products accumulate in float32."
)
flags.DEFINE_bool("int8_weights", False, "Decoder weights as int8 with one scale per output feature: half the memory.")
_EMIT = flags.DEFINE_list(
  "emit",
  [],
  f"Any of {', '.join(EMIT)}: adds token_ids, kept, kept_patches, counts, first_logits, timing to every row.",
)
flags.DEFINE_bool(
  "resume",
  True,
  "Skip prompts that the output answers with the same question and pictures. --noresume replaces the output.",
)
_MESH = flags.DEFINE_list(
  "mesh",
  None,
  "Devices, such as data:4,tensor:2: rows are sharded over data; heads, feed-forward and vocabulary over tensor. Axes "
  "that do not divide evenly are replicated. By default chosen from devices and the size of the weights, and printed.",
)
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "Join the processes that JAX finds itself, on a Cloud TPU slice or under SLURM."
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "host:port of the first of several processes; start the same command in each."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Index of this process, from 0.", lower_bound=0)
flags.DEFINE_bool("strict", False, "Exit with status 1 when a row has an error.")
flags.DEFINE_string(
  "profile_dir", None, "Directory for a JAX profiler trace, for TensorBoard or Perfetto; use few prompts."
)
_COMPILATION_CACHE_DIR = flags.DEFINE_string(
  "compilation_cache_dir", None, "JAX's compilation cache; in the user's cache folder by default, off if empty."
)
flags.DEFINE_bool("allow_urls", False, "Download pictures whose image is an http or https URL.")
_VALUES = (
  "checkpoint",
  "split",
  "allow_pickle",
  "allow_urls",
  "image_aspect_ratio",
  "dtype",
  "int8_weights",
  "resume",
  "strict",
)
_PATHS = ("prompts", "output", "image_dir", "pictures", "profile_dir")


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """A run as configured by the flags, with their names and meanings; `mesh` is None if it is to be chosen."""

  checkpoint: str
  prompts: pathlib.Path
  output: pathlib.Path
  split: str | None = None
  columns: Columns = Columns()
  image_dir: pathlib.Path = pathlib.Path()
  pruning: PruningConfig = PruningConfig()
  generation: GenerationConfig = GenerationConfig()
  inputs: InputConfig = InputConfig()
  dtype: str = "bfloat16"
  int8_weights: bool = False
  mesh: dict[str, int] | None = None
  emit: frozenset[str] = frozenset()
  pictures: pathlib.Path | None = None
  resume: bool = True
  strict: bool = False
  profile_dir: pathlib.Path | None = None
  compilation_cache_dir: str = ""
  allow_pickle: bool = False
  allow_urls: bool = False
  image_aspect_ratio: str = "checkpoint"


def config_from_flags() -> RunConfig:
  """Reads and checks the flags; raises `UserError` if one is missing or malformed, or contradicts another."""
  values, paths = ({name: flags.FLAGS[name].value for name in names} for names in (_VALUES, _PATHS))
  for name in ("prompts", "output"):
    if not paths[name]:
      raise UserError(f"--{name} is required; see --help")
  for name, path in paths.items():
    if path and remote.is_remote(path):
      raise UserError(f"--{name}={path}: only --checkpoint may be a URL; mount the bucket (gcsfuse) and name its path")
  for flag in (_BATCH_SIZE, _MAX_NEW_TOKENS):
    if flag.value is not None and flag.value < 1:
      raise UserError(f"--{flag.name} must be at least 1, but is {flag.value}")
  unknown = sorted(set(_EMIT.value) - set(EMIT))
  if unknown:
    raise UserError(f"--emit: unknown {', '.join(unknown)}; known: {', '.join(EMIT)}")
  sampling = Sampling(_TEMPERATURE.value, _TOP_P.value)
  return RunConfig(
    **values,
    **{name: pathlib.Path(path) for name, path in paths.items() if path},
    pruning=_pruning(),
    generation=GenerationConfig(_MAX_NEW_TOKENS.value, sampling, _SEED.value, _IGNORE_EOS.value),
    inputs=InputConfig(
      _PROMPT_TEMPLATE.value,
      command.numbers(_PROMPT_BUCKETS, int) or (),
      _BATCH_SIZE.value,
      _MAX_IMAGE_TOKENS.value,
      _PREFILL_BATCH_SIZE.value,
    ),
    mesh=sharding.parse_mesh(_MESH.value) if _MESH.value else None,
    columns=Columns.parse(_COLUMNS.value),
    emit=frozenset(_EMIT.value),
    compilation_cache_dir=command.compilation_cache_dir(_COMPILATION_CACHE_DIR.value),
  )


def _pruning() -> PruningConfig:
  """Method, layers and keep counts from their flags or a schedule file; parameters from their flag."""
  parameters = command.numbers(_METHOD_PARAMETERS, command.named_number, "such as threshold:0.8") or ()
  given = (_METHOD, _PRUNE_LAYERS, _KEEP)
  if _SCHEDULE.value is None:
    method = _METHOD.value
    layers, keep = command.numbers(_PRUNE_LAYERS, int), command.numbers(_KEEP, command.keep_count)
  else:
    for flag in given:
      if flag.present:
        raise UserError(f"--schedule={_SCHEDULE.value} takes the place of --{flag.name}")
    fields = read_json(pathlib.Path(_SCHEDULE.value))
    try:
      method, *lists = (fields[flag.name] for flag in given)
      layers, keep = (tuple(map(int, values)) for values in lists)
    except (KeyError, TypeError, ValueError) as error:
      wanted = "an object with method, prune_layers and keep, as experiments.flow.calibrate writes it"
      raise UserError(f"--schedule={_SCHEDULE.value}: not {wanted}") from error
  methods.parse(method)
  return PruningConfig(method, layers, keep, parameters)


def join_processes() -> None:
  """Joins the other processes named by the flags; errors as in `processes.initialize`."""
  own = {flag.name: flag.value for flag in (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID)}
  processes.initialize(from_environment=_DISTRIBUTED.value, **own)
