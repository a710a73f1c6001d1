"""Generation: a prefill program and a decode program per input shape, compiled once.

Axes: B rows, S slots, M new tokens, V vocabulary.
"""

import dataclasses
import functools
import time
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import Array, UInt
from PIL import Image

from himap_jax import programs, sharding
from himap_jax.checkpoint import LoadedModel
from himap_jax.llava import Inputs
from himap_jax.processing import DEFAULT_BUCKETS, Processor
from himap_jax.programs import Programs
from himap_jax.sampling import Sampling
from himap_jax.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class Generation:
  """The result of one batch, on the host.

  Attributes:
    tokens: for each row its generated token ids, the one that ended it included.
    kept: for each stage the kept image tokens of every row, ascending; `[B, keep]` where all rows keep as many.
    logits: `[B, V]` float32, of the first generated token.
    prefill_seconds: wall time of the prefill program for the batch.
    decode_seconds: wall time of the decode program for the batch.
    rungs: `[B]` where there is a ladder of schedules, the rung of every row.
  """

  tokens: list[list[int]]
  kept: tuple[Sequence[np.ndarray], ...]
  logits: np.ndarray
  prefill_seconds: float
  decode_seconds: float
  rungs: np.ndarray | None = None


def row_seeds(seed: int, row_ids: Sequence[int | str]) -> UInt[np.ndarray, "B"]:
  """A seed for each row's random keys, the same whatever the batch it is in."""
  return np.array([zlib.crc32(f"{seed}/{row_id!r}".encode()) for row_id in row_ids], np.uint32)


@functools.lru_cache(maxsize=32)
def compiled_programs(*settings: Any) -> dict[tuple[Any, ...], Any]:
  """The compiled programs of the same settings by name and input shape, shared by all generators."""
  del settings
  return {}


class Generator:
  """Runs batches through the compiled programs of one model, schedule and way of sampling.

  Attributes:
    num_programs: programs compiled so far.
    compile_seconds: time spent compiling them or reading them from the persistent cache.
  """

  def __init__(
    self,
    loaded: LoadedModel,
    schedule: Schedule,
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    ignore_eos: bool = False,
  ):
    if max_new_tokens < 1:
      raise ValueError(f"max_new_tokens must be at least 1, but is {max_new_tokens}")
    self._params = loaded.params
    self._mesh = sharding.mesh_of(loaded.params)
    self._seed = seed
    eos_token_ids = () if ignore_eos else loaded.eos_token_ids
    types = jax.tree.structure(loaded.params)  # tells quantised weights from others
    settings = (loaded.config, self._mesh, schedule, loaded.dtype, max_new_tokens, sampling, eos_token_ids)
    self._compiled = compiled_programs(types, *settings)
    self.num_programs = 0
    self.compile_seconds = 0.0
    self._jitted = programs.make_programs(*settings, options=programs.compiler_options(loaded.params))

  def __call__(self, inputs: Inputs, row_ids: Sequence[int | str]) -> Generation:
    """Generates for a batch.

    Args:
      inputs: the batch; where there are several processes, the rows of this one's share.
      row_ids: one a row; with the seed they make each row's random key, whatever the batch it is in.
    """
    seeds = row_seeds(self._seed, row_ids)
    inputs, seeds = sharding.from_local_rows((inputs, seeds), self._mesh)
    prefill, decode = self._programs(inputs, seeds)
    start = time.perf_counter()
    result = jax.block_until_ready(prefill(self._params, inputs, seeds))
    middle = time.perf_counter()
    kept, logits = sharding.to_local_rows((result.kept, result.logits))
    tokens, num_tokens = decode(self._params, result.logits, result.caches, result.next_position, seeds)
    tokens, num_tokens = sharding.to_local_rows((tokens, num_tokens))
    end = time.perf_counter()
    return Generation(
      tokens=[row[:count].tolist() for row, count in zip(tokens, num_tokens, strict=True)],
      kept=kept,
      logits=logits,
      prefill_seconds=middle - start,
      decode_seconds=end - middle,
    )

  def _programs(self, inputs: Inputs, seeds: UInt[Array, "B"]) -> Programs:
    shape = inputs.tokens.shape
    if shape not in self._compiled:
      start = time.perf_counter()
      lowered = programs.lower(self._jitted, self._params, inputs, seeds)
      self._compiled[shape] = Programs(*(program.compile() for program in lowered))
      self.num_programs += 2
      self.compile_seconds += time.perf_counter() - start
      logging.info("ready: programs of shape %s", shape)
    return self._compiled[shape]


@dataclasses.dataclass(frozen=True)
class Answer:
  """An answer.

  Attributes:
    text: without special tokens.
    token_ids: the generated tokens, the one that ended the answer included.
    kept: for each stage the kept image tokens as indices 0 … N − 1, ascending.
    first_logits: `[V]` float32 logits of the first generated token.
  """

  text: str
  token_ids: list[int]
  kept: list[list[int]]
  first_logits: np.ndarray


def generate(
  loaded: LoadedModel,
  images: Sequence[Image.Image],
  questions: Sequence[str],
  *,
  schedule: Schedule = Schedule(),
  max_new_tokens: int = 32,
  temperature: float = 0.0,
  top_p: float = 1.0,
  seed: int = 0,
  ignore_eos: bool = False,
  prompt_template: str = "chat",
  prompt_buckets: Sequence[int] = DEFAULT_BUCKETS,
  batch_size: int = 8,
) -> list[Answer]:
  """Answers questions about images, one image a question.

  Args:
    loaded: the model.
    images: RGB pictures.
    questions: as many.
    schedule: where and how image tokens are pruned; nowhere by default.
    max_new_tokens: the longest answer, in tokens.
    temperature: 0 is greedy.
    top_p: nucleus of sampling.
    seed: of sampling.
    ignore_eos: whether to go on to `max_new_tokens` whatever comes.
    prompt_template: `vicuna_v1`, `chat` or a literal with `<image>` and `{question}`.
    prompt_buckets: padded text lengths.
    batch_size: rows per batch.

  Raises:
    ValueError: settings that contradict each other or the model, or a prompt that it cannot take.
  """
  processor = Processor(
    loaded.processor, loaded.config, template=prompt_template, buckets=prompt_buckets, max_new_tokens=max_new_tokens
  )
  generator = Generator(
    loaded,
    schedule,
    max_new_tokens=max_new_tokens,
    sampling=Sampling(temperature, top_p),
    seed=seed,
    ignore_eos=ignore_eos,
  )
  batch_size = sharding.padded_batch_size(batch_size, sharding.mesh_of(loaded.params))
  examples = [processor.prepare(image, question) for image, question in zip(images, questions, strict=True)]
  answers: dict[int, Answer] = {}
  for bucket in processor.buckets:
    rows = [i for i, example in enumerate(examples) if processor.bucket(example) == bucket]
    for first in range(0, len(rows), batch_size):
      group = rows[first : first + batch_size]
      inputs = processor.batch([examples[i] for i in group], bucket=bucket, batch_size=batch_size)
      result = generator(inputs, [*group, *[group[-1]] * (batch_size - len(group))])
      for row, i in enumerate(group):
        answers[i] = Answer(
          text=processor.decode(result.tokens[row]),
          token_ids=result.tokens[row],
          kept=[stage[row].tolist() for stage in result.kept],
          first_logits=result.logits[row],
        )
  return [answers[i] for i in range(len(examples))]
