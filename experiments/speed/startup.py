"""Times `himap_jax.run` from the command to its first answer, and says where the time goes.

    python -m experiments.speed.startup --starts=5

The first start finds a checkpoint in the Hugging Face layout and empty caches: it compiles, and digests the weights. The others
find both in the caches. Every start is a process of its own; the phases end with the lines that `himap_jax.run --verbosity=0` logs.
"""

import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from absl import app, flags

from checkpoints_convert.demo.assemble import assemble
from experiments.shared import tabular
from himap_jax import checkpoint
from himap_jax.errors import UserError
from himap_jax.run import command

_CHECKPOINT = flags.DEFINE_string("checkpoint", "demo", "`demo`, or a directory in the Hugging Face layout.")
_STARTS = flags.DEFINE_integer("starts", 5, "Starts after the first.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", sorted(command.DTYPES), "As in himap_jax.run.")
_PROMPTS = flags.DEFINE_string("prompts", "experiments/demo/prompts.jsonl", "The first prompt is asked.")
_PRUNE_LAYERS = flags.DEFINE_string("prune_layers", "2,8", "As in himap_jax.run.")
_IMAGE_DIR = flags.DEFINE_string("image_dir", "experiments/demo", "As in himap_jax.run.")

READY = re.compile(r"ready: (\w+)")
PHASES = {
  "devices": "Python, imports and flags",
  "checkpoint": "configuration and tokenizer",
  "weights": "reading the weights",
  "programs": "compiled programs",
  "first": "the first answer",
  "end": "the end",
}


def start(arguments: Sequence[str], environment: dict[str, str]) -> dict[str, float]:
  """Seconds that each phase of one run took.

  Raises:
    UserError: the run ended with an error that the user can mend.
    RuntimeError: it failed otherwise.
  """
  begun = time.perf_counter()
  command_line = [sys.executable, "-m", "himap_jax.run", "--verbosity=0", *arguments]
  process = subprocess.Popen(
    command_line, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
  )
  ends, log = {}, []
  for line in process.stderr:
    log.append(line)
    if match := READY.search(line):
      ends.setdefault(match[1], time.perf_counter() - begun)
  if status := process.wait():
    raise (UserError if status == 2 else RuntimeError)("".join(log[-5:]).strip())
  ends["end"] = time.perf_counter() - begun
  moments = [0.0, *(ends[name] for name in PHASES)]
  return {name: after - before for name, before, after in zip(PHASES, moments, moments[1:], strict=False)}


def run() -> int:
  """Starts the command again and again and prints the phases."""
  with tempfile.TemporaryDirectory() as name:
    scratch = pathlib.Path(name)
    source = pathlib.Path(_CHECKPOINT.value)
    if _CHECKPOINT.value == "demo":
      cache = checkpoint.default_cache_dir()
      source = assemble(cache / "demo", cache_dir=cache)
    prompt = json.loads(pathlib.Path(_PROMPTS.value).read_text(encoding="utf-8").splitlines()[0])
    (scratch / "prompts.jsonl").write_text(json.dumps(prompt) + "\n", encoding="utf-8")
    arguments = [
      f"--checkpoint={source}",
      f"--prompts={scratch / 'prompts.jsonl'}",
      f"--image_dir={_IMAGE_DIR.value}",
      f"--output={scratch / 'answers.jsonl'}",
      f"--dtype={_DTYPE.value}",
      f"--prune_layers={_PRUNE_LAYERS.value}",
      "--batch_size=1",
      "--prompt_buckets=64",
      "--max_new_tokens=8",
      "--noresume",
    ]
    environment = {**os.environ, "HIMAP_JAX_CACHE": str(scratch / "cache")}
    first = start(arguments, environment)
    later = [start(arguments, environment) for _ in range(_STARTS.value)]
  totals = [sum(one.values()) - one["end"] for one in (first, *later)]
  rows = [_row(label, first[phase], [one[phase] for one in later]) for phase, label in PHASES.items()]
  rows.append(_row("from the command to the first answer", totals[0], totals[1:]))
  header = "up to", "first start, s", f"later, median of {len(later)}, s", "spread, s"
  print("\n".join(tabular.markdown(header, rows)))
  print(f"later ÷ first: {statistics.median(totals[1:]) / totals[0]:.3f}")
  return 0


def _row(label: str, first: float, later: Sequence[float]) -> tuple[str, ...]:
  return label, f"{first:.2f}", f"{statistics.median(later):.2f}", f"± {(max(later) - min(later)) / 2:.2f}"


if __name__ == "__main__":
  app.run(lambda argv: command.execute("startup", argv, run, resumes=False))
