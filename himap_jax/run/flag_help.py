"""What commands say of their flags: `--help` by topic, and suggestions for unknown flags."""

import difflib
import re
import sys
from collections.abc import Sequence

from absl import flags

TOPICS = {
  "Checkpoint": ("checkpoint", "allow_pickle", "dtype", "int8_weights"),
  "Prompts and pictures": (
    *("prompts", "split", "columns", "image_dir", "allow_urls", "prompt_template", "image_aspect_ratio"),
    *("max_image_tokens", "prompt_buckets", "batch_size", "prefill_batch_size"),
  ),
  "Pruning": ("method", "prune_layers", "keep", "method_parameters", "restore", "keep_positions", "schedule"),
  "Generation": ("max_new_tokens", "temperature", "top_p", "seed", "ignore_eos"),
  "Output": ("output", "emit", "pictures", "show", "resume", "strict", "profile_dir"),
  "Devices": ("mesh", "distributed", "coordinator", "num_processes", "process_id", "compilation_cache_dir"),
}
# What other programs call our flags.
OTHER_NAMES = {
  "checkpoint": ("model", "model_name", "model_path", "model_id", "weights", "pretrained"),
  "prompts": ("input", "inputs", "data", "dataset", "question_file", "questions"),
  "image_dir": ("images", "image_folder", "image_path"),
  "output": ("output_path", "output_file", "answers_file", "answers"),
  "prompt_template": ("template", "conv_mode", "chat_template"),
  "max_new_tokens": ("max_tokens", "max_length"),
  "method": ("pruning", "pruning_method"),
  "prune_layers": ("layers",),
}


def text(doc: str, values: flags.FlagValues, needed: Sequence[str] = ()) -> str:
  """A command's docstring, then its flags by topic; first those that are needed."""
  own = {flag.name: flag for flag in values.get_key_flags_for_module(sys.argv[0])}
  named = {*needed, *(name for names in TOPICS.values() for name in names)}
  topics = {"Needed": needed} | TOPICS | {"Other flags": [name for name in sorted(own) if name not in named]}
  parts, shown = [doc.strip()], set()
  for topic, names in topics.items():
    chosen = [name for name in names if name in own and name not in shown]
    shown.update(chosen)
    if chosen:
      parts.append("\n".join([f"{topic}:", *(_described(own[name]) for name in chosen)]))
  return "\n\n".join([*parts, "--flagfile=FILE reads flags from a file; --helpfull shows those of all libraries."])


def _described(flag: flags.Flag) -> str:
  default = f" (default: {flag.default_as_str})" if flag.default_as_str else ""
  name = f"[no]{flag.name}" if flag.boolean else flag.name
  return flags.text_wrap(f"--{name}: {flag.help}{default}", indent="      ", firstline_indent="  ")


def check_not_empty(values: flags.FlagValues, names: Sequence[str]) -> None:
  """Raises `flags.Error` if one of these flags, or the checkpoint, is given as an empty text."""
  for name in (*names, "checkpoint"):
    if name in values and values[name].value == "":
      raise flags.IllegalFlagValueError(f"--{name} is empty; see --help")


def reason(error: flags.Error, known: Sequence[str]) -> str:
  """Why flags cannot be parsed, in one line; `known` are the flags' names."""
  if not isinstance(error, flags.UnrecognizedFlagError):
    missing = re.search(r"Flag (--\w+) must have a value other than None", str(error))
    return f"{missing[1]} is required; see --help" if missing else " ".join(str(error).split())
  given = error.flagname.replace("-", "_")
  meant = [ours for ours, others in OTHER_NAMES.items() if given in others and ours in known]
  meant = meant or difflib.get_close_matches(given, known, n=1)
  return f"unknown flag --{error.flagname}; {f'did you mean --{meant[0]}? ' if meant else ''}--help shows all"
