"""What the tests of whole runs share: a small job, and what it wrote."""

import dataclasses
import json
import re

from himap_jax import GenerationConfig, InputConfig, PruningConfig
from himap_jax.run import job
from himap_jax.run.config import RunConfig

NAME = "dinov2_shrunk"
MAX_NEW = 6
PRUNE_LAYERS, KEEP = (2, 3), (8, 3)
QUESTIONS = {
  "a": "What is it?",
  "b": "Why?",
  3: "It is <image> where, then?",
  "4": "A question of more bytes than a bucket has.",
}


def make_config(directory, checkpoint, images, cache):
  """Four good prompts over two buckets, with small batches, in a directory of their own."""
  for index, image in enumerate(images):
    image.save(directory / f"{index}.png")
  rows = [
    {"id": row_id, "image": f"{index}.png", "question": question}
    for index, (row_id, question) in enumerate(QUESTIONS.items())
  ]
  write_rows(directory / "prompts.jsonl", rows)
  return RunConfig(
    checkpoint=str(checkpoint),
    prompts=directory / "prompts.jsonl",
    image_dir=directory,
    output=directory / "output.jsonl",
    pruning=PruningConfig("himap", PRUNE_LAYERS, KEEP),
    generation=GenerationConfig(MAX_NEW),
    inputs=InputConfig("<image>{question}", prompt_buckets=(40,), batch_size=2),
    dtype="float32",
    compilation_cache_dir=str(cache / "compiled"),
  )


def write_rows(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path):
  """The rows of an output by their ids."""
  text = path.read_text()
  assert text.endswith("\n")
  rows = [json.loads(line) for line in text.split("\n")[:-1]]
  answers = {row["id"]: row for row in rows}
  assert len(answers) == len(rows)
  return answers


def num_programs(table):
  """The number of programs that a run compiled, by its table."""
  return int(re.search(r"(\d+) programs", table)[1])


def changed(config, **changes):
  """The configuration with other values, whatever the group that they belong to."""
  for group in ("pruning", "generation", "inputs"):
    before = getattr(config, group)
    own = {field.name: changes.pop(field.name) for field in dataclasses.fields(before) if field.name in changes}
    config = dataclasses.replace(config, **{group: dataclasses.replace(before, **own)})
  return dataclasses.replace(config, **changes)


def answers_of(config, **changes):
  """The output of a run, in a file of its own."""
  config = changed(config, output=config.output.with_name("other.jsonl"), resume=False, **changes)
  assert job.run(config) == 0
  return read(config.output)
