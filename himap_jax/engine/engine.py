"""The engine: prefills batches of rows, puts them into slots, and decodes all slots together.

Rows that have ended leave their slots and others enter. No shape depends on which rows are in the slots.

Axes: B rows, V vocabulary.
"""

import dataclasses
import functools
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, UInt

from himap_jax.engine import processes, scoring, sharding
from himap_jax.engine.capacity import BatchSizes, Capacity, Memory, refused_by_compiler
from himap_jax.engine.compiled import CompiledPrograms
from himap_jax.engine.decoding import STEPS, DecodeConfig
from himap_jax.engine.pool import Answered, Clock, Pool, Prefilled, Request, Usage
from himap_jax.engine.sampling import Kind, RowSampling, Sampling
from himap_jax.engine.scoring import Score
from himap_jax.engine.slots import Rows
from himap_jax.errors import check_bools, check_is, check_whole
from himap_jax.inputs import Inputs
from himap_jax.model.network import Model
from himap_jax.pruning.schedule import Schedule

TURN = "himap_jax turn"  # the name, in profiles, of the time in which the host waits for the results of a turn


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
  """Generation of answers; greedy by default.

  Attributes:
    max_new_tokens: the most tokens of an answer.
    seed: of sampling and of methods that choose at random.
    ignore_eos: always generate as many tokens as an answer may have.
  """

  max_new_tokens: int = 32
  sampling: Sampling = Sampling()
  seed: int = 0
  ignore_eos: bool = False

  def __post_init__(self) -> None:
    check_whole("max_new_tokens", self.max_new_tokens)
    check_whole("seed", self.seed, least=-sys.maxsize)
    check_is("sampling", self.sampling, Sampling, "a Sampling")
    check_bools(ignore_eos=self.ignore_eos)


@dataclasses.dataclass(frozen=True)
class Generation:
  """The answers of one batch, on the host.

  Attributes:
    tokens: generated token ids of each row, including the end token.
    kept: for each stage and row the indices of the kept image tokens, ascending.
    logits: `[B, V]` float32, of the first generated token.
    is_finite: whether all logits of all rows were.
  """

  tokens: list[list[int]]
  kept: tuple[list[list[int]], ...]
  logits: Float[np.ndarray, "B V"]
  is_finite: bool
  prefill_seconds: float
  decode_seconds: float


class Batch(NamedTuple):
  """This process's rows of a batch, and the requests of all but those that only fill it."""

  inputs: Inputs
  requests: Sequence[Request]


def row_seeds(seed: int, row_ids: Sequence[int | str]) -> UInt[np.ndarray, "B"]:
  """Seeds of the rows' random keys; a row's seed does not depend on its batch."""
  return np.array([zlib.crc32(f"{seed}/{row_id!r}".encode()) for row_id in row_ids], np.uint32)


class Engine:
  """Answers rows with one model, schedule and generation config.

  Attributes:
    programs: that it runs.
    usage: of all its calls.
    generation: as given.
    capacity: chooses the batch sizes; None if those of the first batch are used.
  """

  def __init__(
    self,
    model: Model,
    schedule: Schedule,
    generation: GenerationConfig = GenerationConfig(),
    *,
    eos_token_ids: tuple[int, ...] = (),
    batch_sizes: BatchSizes | None = None,
    most_steps: int = STEPS,
  ):
    """Makes its programs' settings.

    Args:
      batch_sizes: those of the first batch, for prefill and for decoding, if absent.
      most_steps: of decoding in one turn; after it answers are looked at.
    """
    self.generation, self._mesh = generation, sharding.mesh_of(model.params)
    self.capacity = None if batch_sizes is None else Capacity(model, batch_sizes)
    eos_token_ids = () if generation.ignore_eos else eos_token_ids
    decoding = DecodeConfig(generation.max_new_tokens, eos_token_ids=eos_token_ids, most_steps=most_steps)
    self.programs, self.usage = CompiledPrograms(model, schedule, decoding), Usage()

  def prefill_rows(self, row: Inputs) -> int:
    """Rows, over all processes, of a prefill of prompts of the shape of this one; `UserError` if not one fits."""

    def memory(count: int) -> Memory | None:
      inputs, seeds = sharding.abstract_rows((row, np.zeros(1, np.uint32)), self._mesh, count)
      with refused_by_compiler():
        return self.programs.prefill_memory(inputs, seeds)

    return self.capacity.prefill_rows(row.layout.num_slots, memory)

  def answer(self, batches: Iterable[Batch]) -> Iterator[list[Answered]]:
    """Yields at every turn those of this process's answers that are complete.

    All processes take batches of the same shapes at the same turns, and have as many turns.
    """
    source, clock, pool, kind = iter(batches), Clock(self.programs), None, Kind.GREEDY
    waiting = self._prefill(next(source, None))
    following = next(source, None)
    while waiting is not None or following is not None or (pool is not None and pool.num_active):
      if waiting is None and following is not None and not pool.num_active:
        pool = None  # its memory is free before this prefill, which needs it
        waiting, following = self._prefill(following), next(source, None)
      if waiting is not None and (pool is None or not (pool.num_active or pool.holds(waiting))):
        pool = None  # its memory is free before there are other slots
        kind = max(kind, waiting.kind)  # of later rows, too: those like the ones before may follow
        pool = Pool(self.programs, self._mesh, waiting.state, self._num_slots(waiting, kind), kind)
      if waiting is not None and pool.has_room(waiting):
        # whose shapes and kind the following batch mostly has, too; if not, decoding stops in vain
        turn = pool.start(waiting, room_for=None if following is None else waiting)
        waiting = None
        if self._fits_beside_slots(following):
          waiting = self._prefill(following)  # the devices have work until the next turn, whatever the host does
          following = next(source, None)
      else:
        turn = pool.start(None, room_for=waiting)
      with jax.profiler.TraceAnnotation(TURN):
        answered = pool.finish(turn, clock, self.usage)
      turn = None  # its batch is in the slots
      yield answered

  def _num_slots(self, waiting: Prefilled, kind: Kind) -> int:
    """Slots for rows of a kind with prompts like those that wait."""
    num_rows, batch = len(waiting.state.logits), (waiting.state, waiting.rows)
    if self.capacity is None:
      return num_rows

    def memory(count: int) -> dict[str, Memory] | None:
      with refused_by_compiler():
        return {"prefill": waiting.memory()} | self.programs.memory_with_slots(kind, batch, count)

    one = self.programs.slots(waiting.state, sharding.num_shards(self._mesh))
    return self.capacity.slots(num_rows, sharding.device_bytes(one), memory)

  def __call__(self, inputs: Inputs, row_ids: Sequence[int | str]) -> Generation:
    """Answers one batch.

    Args:
      inputs: this process's rows of the batch.
      row_ids: with the seed they determine the rows' random keys; rows without one only fill the batch.
    """
    before = dataclasses.replace(self.usage)
    requests = [Request(row_id, tag=index) for index, row_id in enumerate(row_ids)]
    answered = [row for turn in self.answer([Batch(inputs, requests)]) for row in turn]
    answered.sort(key=lambda row: row.request.tag)
    return Generation(
      tokens=[row.tokens for row in answered],
      kept=tuple(map(list, zip(*(row.kept for row in answered), strict=True))),
      logits=np.stack([row.logits for row in answered]),
      is_finite=all(row.is_finite for row in answered),
      prefill_seconds=self.usage.prefill_seconds - before.prefill_seconds,
      decode_seconds=self.usage.decode_seconds - before.decode_seconds,
    )

  def score(
    self, inputs: Inputs, row_ids: Sequence[int | str], continuations: Sequence[Sequence[Sequence[int]]]
  ) -> list[list[Score]]:
    """Scores any number of continuations of each row, none of them empty, after one prefill.

    Args:
      inputs: as in a call, like `row_ids`.
      continuations: token ids, for each row with an id.
    """
    state = self._prefill(Batch(inputs, [Request(row_id) for row_id in row_ids])).state
    scores: list[list[Score]] = [[] for _ in continuations]
    for number, packed in enumerate(scoring.pack(continuations, len(inputs.tokens))):
      (tokens,) = sharding.from_local_rows((packed,), self._mesh)
      log_probabilities, is_likeliest = sharding.to_local_rows(self.programs.score(state, tokens))
      for row, own in enumerate(continuations):
        if number < len(own):
          scored = row, slice(len(own[number]))
          scores[row].append(Score(float(log_probabilities[scored].sum()), bool(is_likeliest[scored].all())))
    return scores

  def _fits_beside_slots(self, batch: Batch | None) -> bool:
    """Whether the prefill of a batch, if there is one, fits into the memory beside the slots that there are."""
    if batch is None or self.capacity is None:
      return True
    count = len(batch.inputs.tokens) * processes.share(self._mesh).count
    shapes = sharding.abstract_rows((batch.inputs, np.zeros(1, np.uint32)), self._mesh, count)
    return self.capacity.fits_beside_slots(self.programs.prefill_memory(*shapes))

  def _prefill(self, batch: Batch | None) -> Prefilled | None:
    """Starts the prefill of a batch, if there is one."""
    if batch is None:
      return None
    inputs, requests = batch
    missing = len(inputs.tokens) - len(requests)
    samplings = [request.sampling or self.generation.sampling for request in requests]
    most = self.generation.max_new_tokens
    limits = [min(request.max_new_tokens or most, most) for request in requests]
    keys = [request.key for request in requests]
    rows = Rows(
      seeds=row_seeds(self.generation.seed, [*keys, *(keys[-1:] or [""]) * missing]),
      limits=np.array([*limits, *[0] * missing], np.int32),
      sampling=RowSampling.of([*samplings, *[Sampling()] * missing]),
    )
    inputs, rows = sharding.from_local_rows((inputs, rows), self._mesh)
    own = max(map(Kind.of, (*samplings, self.generation.sampling)))
    kind = Kind(-processes.sum_and_min(0, -own)[1])  # all processes run the same programs
    shapes = sharding.abstract_rows((inputs, rows.seeds), self._mesh, len(inputs.tokens))
    memory = functools.partial(self.programs.prefill_memory, *shapes)
    return Prefilled(requests, self.programs.prefill(inputs, rows.seeds), rows, kind, memory)
