"""The engine: runs batches through a prefill and a decode program, compiled once per input shape.

Axes: B rows, M new tokens, V vocabulary.
"""

import dataclasses
import functools
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Float, UInt

from himap_jax.engine import programs, scoring, sharding
from himap_jax.engine.decoding import DecodeConfig
from himap_jax.engine.programs import Programs
from himap_jax.engine.sampling import Sampling
from himap_jax.engine.scoring import Score
from himap_jax.errors import UserError
from himap_jax.inputs import Inputs
from himap_jax.model.network import Model, Network
from himap_jax.pruning.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
  """Generation of answers; greedy by default.

  Attributes:
    seed: of sampling and of methods that choose at random.
    ignore_eos: always generate `max_new_tokens` tokens.
  """

  max_new_tokens: int = 32
  sampling: Sampling = Sampling()
  seed: int = 0
  ignore_eos: bool = False

  def __post_init__(self) -> None:
    if self.max_new_tokens < 1:
      raise UserError(f"max_new_tokens must be at least 1, but is {self.max_new_tokens}")


@dataclasses.dataclass(frozen=True)
class Generation:
  """The result of one batch, on the host.

  Attributes:
    tokens: generated token ids of each row, including the end token.
    kept: for each stage and row the indices of the kept image tokens, ascending.
    logits: `[B, V]` float32, of the first generated token.
  """

  tokens: list[list[int]]
  kept: tuple[list[list[int]], ...]
  logits: Float[np.ndarray, "B V"]
  prefill_seconds: float
  decode_seconds: float


def row_seeds(seed: int, row_ids: Sequence[int | str]) -> UInt[np.ndarray, "B"]:
  """Seeds of the rows' random keys; a row's seed does not depend on its batch."""
  return np.array([zlib.crc32(f"{seed}/{row_id!r}".encode()) for row_id in row_ids], np.uint32)


@dataclasses.dataclass(frozen=True)
class ProgramKey:
  """What compiled programs depend on besides the shapes of their inputs; `decoding` is None but for decode programs."""

  network: Network
  mesh: Mesh
  schedule: Schedule
  decoding: DecodeConfig | None
  param_types: Any


class Compiled(NamedTuple):
  """A compiled program, and the shapes of its results."""

  program: Any
  results: Any


@functools.lru_cache(maxsize=64)
def _compiled(key: ProgramKey) -> dict[Any, Compiled]:
  """Compiled programs by input shapes, shared by all engines."""
  del key
  return {}


class Engine:
  """Runs batches through the programs of one model, schedule and generation config; counts and times compilations."""

  def __init__(
    self,
    model: Model,
    schedule: Schedule,
    generation: GenerationConfig = GenerationConfig(),
    *,
    eos_token_ids: tuple[int, ...] = (),
  ):
    self._model, self._schedule, self._seed = model, schedule, generation.seed
    self._mesh = sharding.mesh_of(model.params)
    eos_token_ids = () if generation.ignore_eos else eos_token_ids
    self._decoding = DecodeConfig(generation.max_new_tokens, generation.sampling, eos_token_ids)
    key = ProgramKey(model.network, self._mesh, schedule, None, jax.tree.structure(model.params))
    self._shared, self._decodes = _compiled(key), _compiled(dataclasses.replace(key, decoding=self._decoding))
    self._parameters = programs.method_parameters(schedule)
    self.num_programs = 0
    self.compile_seconds = 0.0

  def __call__(self, inputs: Inputs, row_ids: Sequence[int | str]) -> Generation:
    """Generates for a batch.

    Args:
      inputs: this process's rows of the batch.
      row_ids: with the seed they determine the rows' random keys; rows without one repeat the last, as in `Batcher`.
    """
    inputs, seeds = self._on_devices(inputs, row_ids)
    before = self.num_programs
    prefill = self._prefill(inputs, seeds)
    decode = self._once(
      self._decodes, inputs, lambda: self._jitted(inputs).decode.lower(self._model, prefill.results, seeds)
    )
    if self.num_programs > before:
      logging.info("ready: programs of shape %s", inputs.tokens.shape)
    start = time.perf_counter()
    state = jax.block_until_ready(prefill.program(self._model, inputs, seeds, self._parameters))
    middle = time.perf_counter()
    kept, logits = sharding.to_local_rows((state.kept, state.logits))
    tokens, num_tokens = sharding.to_local_rows(decode.program(self._model, state, seeds))
    end = time.perf_counter()
    return Generation(
      tokens=[row[:count].tolist() for row, count in zip(tokens, num_tokens, strict=True)],
      kept=tuple([row[row >= 0].tolist() for row in stage] for stage in kept) or self._nothing_kept(len(tokens)),
      logits=logits,
      prefill_seconds=middle - start,
      decode_seconds=end - middle,
    )

  def _nothing_kept(self, num_rows: int) -> tuple[list[list[int]], ...]:
    return tuple([[] for _ in range(num_rows)] for _ in self._schedule.stages)

  def score(
    self, inputs: Inputs, row_ids: Sequence[int | str], continuations: Sequence[Sequence[Sequence[int]]]
  ) -> list[list[Score]]:
    """Scores any number of continuations of each row, none of them empty, after one prefill.

    Args:
      inputs: as in a call, like `row_ids`.
      continuations: token ids, for each row with an id.
    """
    num_rows = len(inputs.tokens)
    inputs, seeds = self._on_devices(inputs, row_ids)
    prefill = self._prefill(inputs, seeds)
    state = prefill.program(self._model, inputs, seeds, self._parameters)
    scores: list[list[Score]] = [[] for _ in continuations]
    for number, packed in enumerate(scoring.pack(continuations, num_rows)):
      (tokens,) = sharding.from_local_rows((packed,), self._mesh)
      lower = functools.partial(
        programs.make_score(self._model, self._mesh).lower, self._model, prefill.results, tokens
      )
      program = self._once(self._shared, (inputs, tokens), lower).program
      log_probabilities, is_likeliest = sharding.to_local_rows(program(self._model, state, tokens))
      for row, own in enumerate(continuations):
        if number < len(own):
          scored = row, slice(len(own[number]))
          scores[row].append(Score(float(log_probabilities[scored].sum()), bool(is_likeliest[scored].all())))
    return scores

  def _on_devices(self, inputs: Inputs, row_ids: Sequence[int | str]) -> tuple[Inputs, jax.Array]:
    """The global inputs and the seeds of all rows."""
    missing = len(inputs.tokens) - len(row_ids)
    seeds = row_seeds(self._seed, [*row_ids, *(list(row_ids[-1:]) or [""]) * missing])
    return sharding.from_local_rows((inputs, seeds), self._mesh)

  def _jitted(self, inputs: Inputs) -> Programs:
    schedule = self._schedule if inputs.layout.num_image_tokens else Schedule()
    return programs.make_programs(self._model, self._mesh, schedule, self._decoding)

  def _prefill(self, inputs: Inputs, seeds: jax.Array) -> Compiled:
    arguments = self._model, inputs, seeds, self._parameters
    return self._once(self._shared, inputs, lambda: self._jitted(inputs).prefill.lower(*arguments))

  def _once(self, compiled: dict[Any, Compiled], inputs: Any, lower: Callable[[], Any]) -> Compiled:
    """The program in `compiled` for the shapes of some inputs; lowered and compiled if it is not there."""
    leaves, structure = jax.tree.flatten(inputs)
    shapes = (structure, *((leaf.shape, leaf.dtype) for leaf in leaves))
    if shapes not in compiled:
      start = time.perf_counter()
      lowered = lower()
      compiled[shapes] = Compiled(lowered.compile(), lowered.out_info)
      self.num_programs += 1
      self.compile_seconds += time.perf_counter() - start
    return compiled[shapes]
