"""A pool of slots on the devices, and the rows that are in them.

A turn starts programs and then waits for what they have generated, so that the devices go on with the next prefill while
the host reads the last results.

Axes: V vocabulary.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from himap_jax.engine import processes, sharding
from himap_jax.engine.capacity import Memory
from himap_jax.engine.compiled import CompiledPrograms
from himap_jax.engine.decoding import Decoded
from himap_jax.engine.prefill import PrefillState
from himap_jax.engine.sampling import Kind, Sampling
from himap_jax.engine.slots import Entered, Rows, hold


@dataclasses.dataclass(frozen=True)
class Request:
  """What a row asks for.

  Attributes:
    key: determines the row's random keys, together with the seed.
    max_new_tokens: no more than the engine's, which it is by default.
    sampling: the engine's by default.
    is_complete: whether an answer of these tokens is complete although the model would go on.
    tag: what the caller wants back with the answer.
  """

  key: int | str
  max_new_tokens: int | None = None
  sampling: Sampling | None = None
  is_complete: Callable[[Sequence[int]], bool] | None = None
  tag: Any = None


@dataclasses.dataclass
class Answered:
  """The answer to a request, on the host.

  Attributes:
    kept: for each stage the indices of the kept image tokens, ascending.
    ranks: for each stage their places in its ranking, 0 the best; None if it does not rank. Empty unless
      `Schedule.tells_ranks`.
    logits: `[V]` float32, of the first token.
    prefill_seconds: the row's part of the time of its batch.
    decode_seconds: its part of the time of the steps in which it was decoded.
    tokens: generated token ids, including the end token.
    is_complete: whether they complete the answer for the request.
    is_finite: whether all logits were; if not, the tokens are no answer.
  """

  request: Request
  kept: list[list[int]]
  ranks: list[list[int] | None]
  logits: Float[np.ndarray, "V"]
  prefill_seconds: float
  decode_seconds: float = 0.0
  tokens: list[int] = dataclasses.field(default_factory=list)
  is_complete: bool = False
  is_finite: bool = True

  def extend(self, tokens: Sequence[int]) -> None:
    """Adds tokens, up to the one that completes the answer."""
    if self.request.is_complete is None:
      self.tokens.extend(tokens)
      return
    for token in tokens:
      if not self.is_complete:
        self.tokens.append(token)
        self.is_complete = self.request.is_complete(self.tokens)


@dataclasses.dataclass
class Usage:
  """What the pools of an engine have done so far.

  Attributes:
    slot_steps: decoding steps times slots.
    row_steps: those in which the slot's row was decoded.
  """

  prefill_seconds: float = 0.0
  decode_seconds: float = 0.0
  slot_steps: int = 0
  row_steps: int = 0


class Clock:
  """Seconds from one lap to the next, without those of compilation."""

  def __init__(self, programs: CompiledPrograms):
    self._programs, self._last = programs, time.perf_counter() - programs.seconds

  def lap(self) -> float:
    before, self._last = self._last, time.perf_counter() - self._programs.seconds
    return self._last - before


class Prefilled(NamedTuple):
  """A batch whose prefill was started.

  Attributes:
    requests: those of this process's rows, without rows that fill the batch.
    memory: says what its program takes.
  """

  requests: Sequence[Request]
  state: PrefillState
  rows: Rows
  kind: Kind
  memory: Callable[[], Memory]


class Turn(NamedTuple):
  """Programs that were started: their results, which may not be there yet."""

  entering: Prefilled | None
  entered: Entered | None
  decoded: Decoded


class Pool:
  """Slots for prompts of some shapes.

  Attributes:
    num_active: slots, of all processes, whose rows go on.
  """

  def __init__(self, programs: CompiledPrograms, mesh: Mesh, state: PrefillState, num_slots: int, kind: Kind):
    """Makes slots for rows of a kind with prompts of the shapes of `state`.

    `num_slots` is over all processes, no fewer than the rows of `state`.
    """
    if num_slots < len(state.logits):
      raise ValueError(f"{len(state.logits)} rows do not fit into {num_slots} slots")
    self._programs, self._mesh = programs, mesh
    self._slots = programs.empty_slots(state, num_slots)
    self._slots_per_shard = num_slots // sharding.num_shards(mesh)
    self._rows: dict[int, Answered] = {}  # by slot, among those of this process
    self._stopped = np.zeros_like(sharding.to_local_rows(self._slots.active))
    self._kind, self._num_free, self.num_active = kind, self._slots_per_shard, 0

  def holds(self, batch: Prefilled) -> bool:
    """Whether the slots are as many as a batch's rows, long enough for its prompts, and decoded for its kind."""
    is_enough = batch.kind <= self._kind and self._wanted(batch) <= self._slots_per_shard
    return is_enough and hold(self._slots, batch.state)

  def has_room(self, batch: Prefilled) -> bool:
    """Whether there are enough free slots for a batch, too."""
    return self.holds(batch) and self._num_free >= self._wanted(batch)

  def _wanted(self, batch: Prefilled) -> int:
    """Free slots that every device needs."""
    return len(batch.state.logits) // sharding.num_shards(self._mesh)

  def start(self, entering: Prefilled | None, *, room_for: Prefilled | None) -> Turn:
    """Starts a turn.

    Args:
      entering: rows to put into slots, for which there is room.
      room_for: a batch like the one that enters next, for which decoding makes room.
    """
    entered = None
    if entering is not None:
      self._slots, entered = self._programs.enter(
        self._kind, self._slots, entering.state, entering.rows, not self.num_active
      )
    never = self._slots_per_shard + 1
    wanted = never if room_for is None or not self.holds(room_for) else self._wanted(room_for)
    (stopped,) = sharding.from_local_rows((self._stopped,), self._mesh)
    self._stopped = np.zeros_like(self._stopped)
    self._slots, decoded = self._programs.decode(self._kind, self._slots, stopped, wanted)
    return Turn(entering, entered, decoded)

  def finish(self, turn: Turn, clock: Clock, usage: Usage) -> list[Answered]:
    """Waits for the results of a turn and returns the answers that are complete."""
    complete = [] if turn.entered is None else self._admit(turn.entering, turn.entered, clock, usage)
    decoded = turn.decoded
    results = decoded.tokens, decoded.num_tokens, decoded.active, decoded.is_finite
    tokens, num_tokens, active, is_finite = sharding.to_local_rows(results)
    num_steps = int(decoded.num_steps)
    num_free = (~active).reshape(-1, self._slots_per_shard).sum(axis=1)
    self.num_active, self._num_free = processes.sum_and_min(int(active.sum()), int(num_free.min()))
    seconds, num_all = clock.lap(), int(num_tokens.sum())
    usage.decode_seconds += seconds
    usage.slot_steps += num_steps * len(active)
    usage.row_steps += num_all
    for slot, row in list(self._rows.items()):
      row.decode_seconds += seconds * int(num_tokens[slot]) / max(1, num_all)
      own = tokens[slot, : num_tokens[slot]].tolist()
      row.extend(own if is_finite[slot] else own[:-1])  # the last was chosen by logits that are not finite
      row.is_finite = bool(is_finite[slot]) or row.is_complete
      if row.is_complete or not active[slot]:
        self._stopped[slot] = active[slot]
        complete.append(self._rows.pop(slot))
    return complete

  def _admit(self, entering: Prefilled, entered: Entered, clock: Clock, usage: Usage) -> list[Answered]:
    """Notes who is in which slot; returns the answers of rows that ended with their first token."""
    state = entering.state
    results = entered.first, entered.place, (state.kept, state.ranks), state.logits
    first, place, selected, logits = sharding.to_local_rows(results)
    seconds, complete = clock.lap(), []
    usage.prefill_seconds += seconds
    for index, request in enumerate(entering.requests):
      own = ([stage if stage is None else _present(stage[index]) for stage in stages] for stages in selected)
      row = Answered(request, *own, logits[index].copy(), seconds / len(entering.requests))
      row.is_finite = bool(np.isfinite(row.logits).all())
      row.extend([int(first[index])] if row.is_finite else [])
      if place[index] < 0:
        complete.append(row)
      else:
        shard = index // self._wanted(entering)  # among those of this process
        self._rows[shard * self._slots_per_shard + int(place[index])] = row
    return complete


def _present(numbers: Int[np.ndarray, "M"]) -> list[int]:
  return numbers[numbers >= 0].tolist()
