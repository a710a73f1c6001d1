"""The same rows again and again in one process: answers stay equal, and memory, open files and rate stay flat."""

import ctypes
import json
import os
import pathlib
import time
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import tiny_checkpoints
from campaign.trials import Part

from himap_jax import GenerationConfig, InputConfig, checkpoint
from himap_jax.engine.capacity import BatchSizes
from himap_jax.generation import make_batcher
from himap_jax.run import command
from himap_jax.run.answering import Answerer
from himap_jax.run.contract import Contract
from himap_jax.run.output import Output
from himap_jax.run.picture_sizes import image_sizes
from himap_jax.run.pictures import PictureFiles
from himap_jax.run.prompts import Prompt, Prompts

NUM_PICTURES = 50
SUBJECTS = (
  "the largest thing",
  "the thing on the left",
  "the thing on the right",
  "the background",
  "the smallest thing",
)
QUESTIONS = ("What colour is {}?", "What shape has {}?", "Is {} red?", "Where is {}?")
MEASURES = "measures.jsonl"
M_ARENA_MAX = -8  # of glibc's malloc.h


def part(name: str, num_rows: int) -> Part:
  """The part for a checkpoint; every trial answers the same rows, in another order and so in other batches."""

  def prepare(shared: pathlib.Path) -> Callable[[np.random.Generator, pathlib.Path], str]:
    # Every trial starts a thread, as a run does once; each would have its own memory.
    ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)
    command.use_compilation_cache(str(shared / "compiled"))
    prompts, files = _prompts(shared, num_rows), PictureFiles(shared)
    answerer, settings = _answerer(name, prompts, files)

    def trial(random: np.random.Generator, directory: pathlib.Path) -> str:
      shuffled = Prompts.of([prompts[index] for index in random.permutation(num_rows)])
      start = time.monotonic()
      with Output(Contract(directory / "rows.jsonl", settings, shuffled, files), resume=False) as output:
        answerer.answer_all(output)
      seconds = time.monotonic() - start
      rows = [json.loads(line) for line in (directory / "rows.jsonl").read_text().splitlines()]
      answers = {row["id"]: [row["answer"], row["error"], row["digest"], row["token_ids"]] for row in rows}
      assert len(rows) == len(answers) == num_rows
      assert all(row["error"] is None for row in rows), [row["error"] for row in rows]
      first = shared / "first.json"
      if not first.exists():
        first.write_text(json.dumps(answers))
      expected = json.loads(first.read_text())
      changed = [row_id for row_id, answer in answers.items() if answer != expected[row_id]]
      assert not changed, changed
      _measure(shared, num_rows, seconds)
      return "equal answers"

    return trial

  return Part(
    f"{num_rows:,} rows on {pathlib.Path(name).name}, again and again, have equal answers.", prepare, num_rows, summary
  )


def summary(shared: pathlib.Path) -> str:
  """Memory, open files and rate of the last process, from its second trial on; the first compiles."""
  lines = [json.loads(line) for line in (shared / MEASURES).read_text().splitlines()]
  own = [line for line in lines if line["process"] == lines[-1]["process"]][1:]
  if len(own) < 2:
    return "Too few trials in one process for a slope."
  rows = np.cumsum([line["rows"] for line in own])
  slope = np.polyfit(rows, [line["resident_mb"] for line in own], 1)[0] * 1000
  files = sorted({line["open_files"] for line in own})
  rates = [line["rows"] / line["seconds"] for line in own]
  return "\n".join(
    [
      "| measure | over the trials |",
      "|---|---|",
      f"| rows | {rows[-1]:,} |",
      f"| resident memory | {own[0]['resident_mb']:,.0f} to {own[-1]['resident_mb']:,.0f} MB, {slope:+.2f} MB per 1,000 rows |",
      f"| open files | {files[0]} to {files[-1]} |",
      f"| rate | {min(rates):.2f} to {max(rates):.2f} rows/s, {rates[-1] / rates[0] - 1:+.0%} from first to last |",
    ]
  )


def _prompts(shared: pathlib.Path, num_rows: int) -> list[Prompt]:
  for index in range(NUM_PICTURES):
    path = shared / f"{index}.png"
    if not path.exists():
      tiny_checkpoints.noise_image((300 + index, 280), seed=index).save(path)
  texts = [question.format(subject) for question in QUESTIONS for subject in SUBJECTS]
  return [
    Prompt(str(index), (f"{index % NUM_PICTURES}.png",), texts[index // NUM_PICTURES % len(texts)])
    for index in range(num_rows)
  ]


def _answerer(name: str, prompts: list[Prompt], files: PictureFiles) -> tuple[Answerer, dict]:
  """What `himap_jax.run` makes, in float32, with HiMAP in the first layers, which is quick; and its settings."""
  loaded = checkpoint.load(name, dtype=jnp.float32)
  schedule = loaded.schedule("himap", (1, 2), (0.25, 0.0625))
  processor, generation, inputs = loaded.prompts(), GenerationConfig(max_new_tokens=8), InputConfig()
  sizes = image_sizes(Prompts.of(prompts), files, processor)
  batcher = make_batcher(loaded, processor, sizes, inputs.prompt_buckets, generation.max_new_tokens, schedule)
  engine = loaded.engine(schedule, generation, BatchSizes(8))
  return Answerer(processor, batcher, engine, frozenset({"tokens"})), {"checkpoint": loaded.digest()}


def _measure(shared: pathlib.Path, num_rows: int, seconds: float) -> None:
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  measured = {
    "process": os.getpid(),
    "rows": num_rows,
    "seconds": round(seconds, 2),
    "resident_mb": round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1),
    "open_files": len(os.listdir("/proc/self/fd")),
  }
  with (shared / MEASURES).open("a") as lines:
    lines.write(json.dumps(measured) + "\n")


PART = part("demo", 1000)
