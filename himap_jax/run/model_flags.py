"""The flags of the commands that answer: the model, its pruning, its prompts and its generation."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from absl import flags

from checkpoints_convert.errors import CheckpointError
from checkpoints_convert.json_files import read_json
from himap_jax import checkpoint
from himap_jax.engine.engine import GenerationConfig
from himap_jax.engine.sampling import Sampling
from himap_jax.errors import UserError
from himap_jax.generation import InputConfig
from himap_jax.pruning import methods
from himap_jax.pruning.config import PruningConfig
from himap_jax.run import command, flag_values, pruning_flags
from himap_jax.run.config import AnswerConfig

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
pruning_flags.define(flags.FLAGS)
flags.adopt_module_key_flags(pruning_flags)  # for --help
_SCHEDULE = flags.DEFINE_string(
  "schedule",
  None,
  "JSON file with method, prune_layers and keep (counts, or shares such as 0.5) instead of these flags; "
  "experiments.flow.calibrate writes one.",
)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 32, "The longest answer, in tokens.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "Sampling temperature; 0 is greedy decoding.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Sample from the smallest set of likeliest tokens with this probability.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of sampling, and of methods that choose at random.")
_IGNORE_EOS = flags.DEFINE_bool("ignore_eos", False, "Always generate max_new_tokens tokens.")
_PROMPT_BUCKETS = flags.DEFINE_list(
  "prompt_buckets",
  [str(bucket) for bucket in InputConfig().prompt_buckets],
  "Padded text lengths, in tokens; each is compiled once, when needed. Doublings of the last are added, up to "
  "the model's context.",
)
_MAX_IMAGE_TOKENS = flags.DEFINE_integer(
  "max_image_tokens",
  None,
  "Most image tokens of a picture, for models that choose them by its size. The checkpoint's own limit by default.",
  lower_bound=1,
)
_PROMPT_TEMPLATE = flags.DEFINE_string(
  "prompt_template",
  "chat",
  "chat: the checkpoint's own; a template of the model: vicuna_v1 of LLaVA, vqa, caption and mme of Qwen-VL-Chat; or a "
  "text with <image> and {question}.",
)
flags.DEFINE_enum(
  "image_aspect_ratio",
  "checkpoint",
  checkpoint.ASPECT_RATIOS,
  "pad: pad pictures to squares, as LLaVA-1.5 was trained and its scores were measured; checkpoint: as its processor does.",
)
flags.DEFINE_enum(
  "dtype",
  "bfloat16",
  sorted(checkpoint.DTYPES),
  "Dtype of parameters and activations; products accumulate in float32.",
)
flags.DEFINE_bool("int8_weights", False, "Decoder weights as int8 with one scale per output feature: half the memory.")
_MESH = flags.DEFINE_list(
  "mesh",
  None,
  "Devices, such as data:4,tensor:2: rows are sharded over data; heads, feed-forward and vocabulary over tensor. Axes "
  "that do not divide evenly are replicated. By default chosen from devices and the size of the weights, and printed.",
)
_COMPILATION_CACHE_DIR = flags.DEFINE_string(
  "compilation_cache_dir", None, "JAX's compilation cache; in the user's cache folder by default, off if empty."
)
flags.DEFINE_bool("allow_urls", False, "Download pictures whose image is an http or https URL.")
_VALUES = ("checkpoint", "allow_pickle", "allow_urls", "image_aspect_ratio", "dtype", "int8_weights")


def values_from_flags() -> dict[str, Any]:
  """The fields of an `AnswerConfig`; raises `UserError` if a flag is malformed or contradicts another."""
  if _MAX_NEW_TOKENS.value < 1:
    raise UserError(f"--max_new_tokens must be at least 1, but is {_MAX_NEW_TOKENS.value}")
  sampling = Sampling(_TEMPERATURE.value, _TOP_P.value)
  return {
    **{name: flags.FLAGS[name].value for name in _VALUES},
    "pruning": _pruning(),
    "generation": GenerationConfig(_MAX_NEW_TOKENS.value, sampling, _SEED.value, _IGNORE_EOS.value),
    "inputs": InputConfig(
      _PROMPT_TEMPLATE.value, flag_values.buckets(_PROMPT_BUCKETS), max_image_tokens=_MAX_IMAGE_TOKENS.value
    ),
    "mesh": flag_values.parse_mesh(_MESH.value) if _MESH.value else None,
    "compilation_cache_dir": command.compilation_cache_dir(_COMPILATION_CACHE_DIR.value),
  }


def one_row_config() -> AnswerConfig:
  """The configuration of a command that answers one row at a time; errors as of `values_from_flags`."""
  values = values_from_flags()
  return AnswerConfig(**values | {"inputs": dataclasses.replace(values["inputs"], batch_size=1)})


def _pruning() -> PruningConfig:
  """Method, layers and keep counts from their flags or a schedule file; parameters and options from their flags."""
  chosen = pruning_flags.config(flags.FLAGS)
  if _SCHEDULE.value is None:
    return chosen
  given = ("method", "prune_layers", "keep")
  for name in given:
    if flags.FLAGS[name].present:
      raise UserError(f"--schedule={_SCHEDULE.value} takes the place of --{name}")
  try:
    fields = read_json(pathlib.Path(_SCHEDULE.value))
  except CheckpointError as error:
    raise UserError(f"--schedule={error}") from error
  if not fields.keys() >= set(given) or not isinstance(fields["method"], str):
    wanted = "an object with method, prune_layers and keep, as experiments.flow.calibrate writes it"
    raise UserError(f"--schedule={_SCHEDULE.value}: not {wanted}")
  methods.parse(fields["method"])
  for name in ("method_parameters", "restore", "keep_positions"):
    if fields.get(name):
      raise UserError(f"--schedule={_SCHEDULE.value}: {name} is a flag of its own, --{name}")
  layers = _listed(fields, "prune_layers", _is_whole, "layers such as 2")
  keep = _listed(fields, "keep", _is_count_or_share, "counts such as 288 or shares such as 0.5")
  return dataclasses.replace(chosen, method=fields["method"], prune_layers=layers, keep=keep)


def _listed(fields: Mapping[str, Any], name: str, is_right: Callable[[Any], bool], wanted: str) -> tuple[Any, ...]:
  """The values of a list in the schedule file; raises `UserError` unless it is a list of such values."""
  values = fields[name]
  if not isinstance(values, list) or not all(map(is_right, values)):
    raise UserError(f"--schedule={_SCHEDULE.value}: {name} must be a list of {wanted}, not {values!r:.100}")
  return tuple(values)


def _is_whole(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _is_count_or_share(value: Any) -> bool:
  return _is_whole(value) or (isinstance(value, float) and 0 < value <= 1)
