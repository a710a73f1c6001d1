"""Random batches with one poisoned row: the others, and those that take their slots, answer as if it were harmless."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import tiny_checkpoints
from campaign import models
from campaign.trials import Part, Trial

from himap_jax import GenerationConfig, checkpoint
from himap_jax.engine.batching import Batcher, Bucket, ImageBucket
from himap_jax.engine.capacity import BatchSizes
from himap_jax.engine.engine import Batch
from himap_jax.engine.pool import Answered, Request
from himap_jax.errors import UserError
from himap_jax.inputs import Example
from himap_jax.pruning.methods import METHODS
from himap_jax.pruning.schedule import Schedule

NUM_NEW = 4
POISONS = ("NaN picture", "infinite picture", "longest prompt", "no picture")
WORDS = ("What", "is", "it", "there", "why", "so", "red", "dog", "left", "of")


def prepare(shared: pathlib.Path) -> Trial:
  load = functools.cache(
    lambda name: checkpoint.load(str(models.made(shared, name)), dtype=jnp.float32, cache_dir=shared / "cache")
  )
  return lambda random, directory: _trial(load, random)


def _trial(load: Any, random: np.random.Generator) -> str:
  loaded, schedule, method = None, None, ""
  while schedule is None:
    loaded, method = load(str(random.choice(list(models.MAKERS)))), str(random.choice(list(METHODS)))
    schedule = _schedule(loaded, method, random)
  poison = str(random.choice(POISONS if schedule.is_ranking else POISONS[:3]))
  num_rows = int(random.integers(2, 5))
  rows = [_row(loaded, random) for _ in range(num_rows)]
  place = int(random.integers(num_rows))
  long = _row(loaded, random, num_words=40)
  slots = long.num_text_tokens
  size = rows[0].size
  bucket = ImageBucket(size.num_tiles, size.num_tokens, is_ragged=schedule.is_ranking and random.random() < 0.5)
  if poison == "no picture":
    bucket = bucket._replace(is_ragged=True)
  elif bucket.is_ragged:
    rows[place - 1] = loaded.prompts().prepare([], "Why so?")
  harmless = _answers(loaded, schedule, [rows], (bucket, slots))
  rows, before = list(rows), rows
  rows[place] = {"longest prompt": long, "no picture": None}.get(poison, rows[place])
  if rows[place] is None:
    rows[place] = loaded.prompts().prepare([], "Why?")
  elif poison.endswith("picture"):
    value = np.nan if poison.startswith("NaN") else np.inf
    pixels = np.full_like(rows[place].images.pixels, value)
    rows[place] = dataclasses.replace(rows[place], images=rows[place].images.replace(pixels=pixels))
  found = _answers(loaded, schedule, [rows, before], (bucket, slots))  # those before take the same slots afterwards
  for batch, row in found.keys() - {(0, place)}:
    own, expected = found[batch, row], harmless[0, row]
    what = (loaded.family.model_type, method, poison, batch, row, place)
    assert (own.tokens, own.kept) == (expected.tokens, expected.kept), (what, own, expected)
    np.testing.assert_allclose(own.logits, expected.logits, atol=1e-4, rtol=0, err_msg=str(what))
  return f"unchanged beside and after a row with {poison}"


def _row(loaded: checkpoint.LoadedModel, random: np.random.Generator, num_words: int = 0) -> Example:
  """A question of some words, about a picture of noise."""
  words = random.choice(WORDS, num_words or random.integers(1, 8))
  return loaded.prompts().prepare([tiny_checkpoints.noise_image((60, 44), int(random.integers(99)))], " ".join(words))


def _schedule(loaded: checkpoint.LoadedModel, method: str, random: np.random.Generator) -> Schedule | None:
  """A method with layers and shares that are drawn; None if the model cannot run it there."""
  entry, depth = METHODS[method], loaded.config.text.num_hidden_layers
  num_stages = len(entry.criteria) if len(entry.criteria) != 1 else int(random.integers(1, 3))
  layers = sorted(random.choice(np.arange(1, depth), size=min(num_stages, depth - 1), replace=False).tolist())
  if entry.freezes:
    layers = sorted(random.choice(depth, size=2, replace=False).tolist())
  elif entry.criteria and (entry.acts == "before" or (entry.acts != "inside" and random.random() < 0.5)):
    layers = [0, *layers[1:]]
  keep = None if entry.freezes else tuple(sorted(random.uniform(0.2, 0.9, len(layers)).tolist(), reverse=True))
  restore = bool(random.random() < 0.2)
  try:
    return loaded.schedule(method, tuple(layers), keep, restore=restore)
  except UserError:
    return None


def _answers(
  loaded: Any, schedule: Schedule, batches: list[list[Example]], shape: tuple[ImageBucket, int]
) -> dict[tuple[int, int], Answered]:
  """The answers of batches that use the same slots after each other, by batch and row."""
  own, slots = shape
  text = loaded.config.text
  batcher = Batcher(text.max_position_embeddings, batches[0][0], [own], buckets=(slots,), max_new_tokens=NUM_NEW)
  bucket = Bucket(own.num_tiles, own.num_image_tokens, slots, own.is_ragged)
  packed = [
    Batch(
      batcher.pack(rows, bucket=bucket, batch_size=len(rows)),
      [Request(row, tag=(number, row)) for row in range(len(rows))],
    )
    for number, rows in enumerate(batches)
  ]
  num_rows = len(batches[0])
  engine = loaded.engine(schedule, GenerationConfig(NUM_NEW, ignore_eos=True), BatchSizes(num_rows, num_rows))
  return {row.request.tag: row for turn in engine.answer(packed) for row in turn}


PART = Part("A row answers the same, and keeps the same image tokens, whatever is beside or before it.", prepare)
