"""The flags of `himap_jax.run`."""

import dataclasses
import pathlib

from absl import flags

from checkpoints_convert import remote
from himap_jax.engine import processes
from himap_jax.errors import UserError
from himap_jax.run import flag_values, model_flags
from himap_jax.run.config import RunConfig
from himap_jax.run.prompts import Columns

EMIT = ("tokens", "kept", "patches", "counts", "logits", "timing")

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
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size",
  None,
  "The most rows that are decoded together: the slots. By default chosen from the memory of the devices and printed.",
)
_PREFILL_BATCH_SIZE = flags.DEFINE_integer(
  "prefill_batch_size", None, "The most rows that are prefilled together. By default chosen and printed.", lower_bound=1
)
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
_VALUES = ("split", "resume", "strict")
_PATHS = ("prompts", "output", "image_dir", "pictures", "profile_dir")


def config_from_flags() -> RunConfig:
  """Reads and checks the flags; raises `UserError` if one is missing or malformed, or contradicts another."""
  values, paths = ({name: flags.FLAGS[name].value for name in names} for names in (_VALUES, _PATHS))
  for name in ("prompts", "output"):
    if not paths[name]:
      raise UserError(f"--{name} is required; see --help")
  for name, path in paths.items():
    if path and remote.is_remote(path):
      raise UserError(f"--{name}={path}: only --checkpoint may be a URL; mount the bucket (gcsfuse) and name its path")
  if _BATCH_SIZE.value is not None and _BATCH_SIZE.value < 1:
    raise UserError(f"--batch_size must be at least 1, but is {_BATCH_SIZE.value}")
  answering = model_flags.values_from_flags()
  sizes = {"batch_size": _BATCH_SIZE.value, "prefill_batch_size": _PREFILL_BATCH_SIZE.value}
  answering["inputs"] = dataclasses.replace(answering["inputs"], **sizes)
  return RunConfig(
    **answering,
    **values,
    **{name: pathlib.Path(path) for name, path in paths.items() if path},
    columns=Columns.parse(_COLUMNS.value),
    emit=frozenset(flag_values.chosen(_EMIT, EMIT)),
  )


def join_processes() -> None:
  """Joins the other processes named by the flags; errors as in `processes.initialize`."""
  own = {flag.name: flag.value for flag in (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID)}
  processes.initialize(from_environment=_DISTRIBUTED.value, **own)
