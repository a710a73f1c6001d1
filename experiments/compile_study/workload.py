"""Prompts of mixed lengths, and their batches."""

import collections
import json
import pathlib
from collections.abc import Sequence

import numpy as np

from himap_jax.engine.batching import Batcher
from himap_jax.families.family import Processor
from himap_jax.inputs import Example, Inputs
from himap_jax.run.pictures import load_image

DEMO = pathlib.Path(__file__).parents[1] / "demo"
SPREAD = 1.0  # standard deviation of the logarithm of a prompt's number of questions
MOST_QUESTIONS = 24


def make_examples(processor: Processor, num_prompts: int, *, seed: int) -> list[Example]:
  """Prompts about the demo's pictures; the number of questions in each is log-normal, mostly one or two."""
  rng = np.random.default_rng(seed)
  rows = [json.loads(line) for line in (DEMO / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
  counts = np.clip(np.rint(rng.lognormal(0, SPREAD, num_prompts)), 1, MOST_QUESTIONS).astype(int)
  examples = []
  for count in counts:
    questions = " ".join(rows[index]["question"] for index in rng.integers(len(rows), size=count))
    examples.append(processor.prepare(load_image(DEMO / rows[rng.integers(len(rows))]["image"]), questions))
  return examples


def make_batches(batcher: Batcher, examples: Sequence[Example], batch_size: int, *, is_bucketed: bool) -> list[Inputs]:
  """Batches in order of arrival, of one bucket each or padded to their longest prompt."""
  waiting: dict[int, list[Example]] = collections.defaultdict(list)
  groups = []
  for example in examples:
    bucket = batcher.bucket(example) if is_bucketed else 0
    waiting[bucket].append(example)
    if len(waiting[bucket]) == batch_size:
      groups.append((bucket, waiting.pop(bucket)))
  groups += waiting.items()
  return [
    batcher.pack(rows, bucket=bucket or max(row.num_text_tokens for row in rows), batch_size=batch_size)
    for bucket, rows in groups
  ]
