"""Times `himap_jax.run` from the command to its first answer, phase by phase.

    python -m experiments.speed.startup --starts=5

The first start reads a checkpoint in the Hugging Face layout with empty caches: it compiles, and digests the weights.
Later starts find both in the caches. Every start is a new process; phases end with the lines logged by `himap_jax.run
--verbosity=0`.
"""

import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from absl import flags

from checkpoints_convert.demo.assemble import ADAPTERS, assemble
from experiments.shared import tabular
from himap_jax import checkpoint
from himap_jax.errors import UserError
from himap_jax.run import command
from himap_jax.run.progress import Progress

_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", "demo", "`demo` or `demo_cross`, or a directory in the Hugging Face layout."
)
_STARTS = flags.DEFINE_integer("starts", 5, "Number of starts after the first.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", sorted(checkpoint.DTYPES), "As in himap_jax.run.")
_PROMPTS = flags.DEFINE_string("prompts", "experiments/demo/prompts.jsonl", "File whose first prompt is asked.")
_METHOD = flags.DEFINE_string("method", "himap", "As in himap_jax.run, with its own layers and counts.")
_IMAGE_DIR = flags.DEFINE_string("image_dir", "experiments/demo", "As in himap_jax.run.")

READY = re.compile(r"ready: (\w+)")
PHASES = {
  "devices": "Python, imports and flags",
  "checkpoint": "configuration and tokenizer",
  "weights": "reading the weights",
  "decode": "compiled programs",
  "first": "the first answer",
  "end": "the end",
}
TOTAL = "from the command to the first answer"


def start(arguments: Sequence[str], environment: dict[str, str]) -> dict[str, float]:
  """Seconds of each phase of one run; raises `UserError` or `RuntimeError` if it fails."""
  launched = time.perf_counter()
  command_line = [sys.executable, "-m", "himap_jax.run", "--verbosity=0", *arguments]
  process = subprocess.Popen(
    command_line, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
  )
  ends, log = {}, []
  for line in process.stderr:
    log.append(line)
    if match := READY.search(line):
      ends.setdefault(match[1], time.perf_counter() - launched)
  if status := process.wait():
    raise (UserError if status == 2 else RuntimeError)("".join(log[-5:]).strip())
  ends["end"] = time.perf_counter() - launched
  moments = [0.0, *(ends[name] for name in PHASES)]
  return {name: after - before for name, before, after in zip(PHASES, moments, moments[1:], strict=False)}


def run() -> int:
  source = _CHECKPOINT.value
  if source in ADAPTERS:
    cache = checkpoint.default_cache_dir()
    source = assemble(cache / source, source, cache_dir=cache, adapter=ADAPTERS[source])
  with tempfile.TemporaryDirectory() as scratch:
    prompts = pathlib.Path(scratch, "prompts.jsonl")
    prompts.write_text(pathlib.Path(_PROMPTS.value).read_text(encoding="utf-8").splitlines()[0], encoding="utf-8")
    arguments = [
      f"--checkpoint={source}",
      f"--prompts={prompts}",
      f"--output={scratch}/answers.jsonl",
      *(f"--{flag.name}={flag.value}" for flag in (_IMAGE_DIR, _DTYPE, _METHOD)),
      *("--batch_size=1", "--prompt_buckets=64", "--max_new_tokens=8", "--noresume"),
    ]
    environment = {**os.environ, "HIMAP_JAX_CACHE": f"{scratch}/cache"}
    starts = []
    with Progress(1 + _STARTS.value, "start", "startup") as progress:
      for _ in range(1 + _STARTS.value):
        starts.append(start(arguments, environment))
        progress.update()
  rows = {label: [one[phase] for one in starts] for phase, label in PHASES.items()}
  rows[TOTAL] = [sum(one.values()) - one["end"] for one in starts]
  medians = {label: statistics.median(later) for label, (_, *later) in rows.items()}
  cells = (
    (label, f"{first:.2f}", f"{medians[label]:.2f}", f"± {(max(later) - min(later)) / 2:.2f}")
    for label, (first, *later) in rows.items()
  )
  header = "up to", "first start, s", f"later, median of {_STARTS.value}, s", "spread, s"
  print("\n".join(tabular.markdown(header, cells)))
  print(f"later ÷ first: {medians[TOTAL] / rows[TOTAL][0]:.3f}")
  return 0


if __name__ == "__main__":
  command.start_action("startup", run, resumes=False)
