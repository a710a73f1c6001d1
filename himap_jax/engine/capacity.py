"""How many rows fit into the devices' memory, by the compiler's own analysis of the programs.

A prefill takes as many rows as its products need for their full speed, in a part of the memory that the weights leave.
Slots for decoding get the rest.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import psutil
from jax.sharding import Mesh

from himap_jax.engine import processes, sharding
from himap_jax.model.network import Model

PROGRAMS = ("prefill", "enter", "decode")
PREFILL_SHARE = 4  # of the memory that the weights leave, a prefill takes at most one part in so many
SLOTS_PER_ROW = 8  # at least so many for each row of a prefill: slots wait until there are as many free ones
MIB = 1 << 20
TOLERANCE = 1 / 32
USABLE = 0.9  # of the memory that is free; the rest is for fragmentation, and on CPU for other programs


class BatchSizes(NamedTuple):
  """Numbers of rows over all processes, rounded up to multiples of the mesh's `data` axis; absent ones are chosen.

  Attributes:
    decode: slots.
    prefill: rows that are prefilled together, at most as many as there are slots.
    num_rows: rows to answer, at most; no more slots are chosen.
  """

  decode: int | None = None
  prefill: int | None = None
  num_rows: int | None = None


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes that a program takes on one device, as reported by the compiler.

  Attributes:
    arguments: inputs and parameters.
    temporaries: live while it runs.
    results: those that do not reuse the memory of arguments.
  """

  arguments: int
  temporaries: int
  results: int

  @classmethod
  def of(cls, compiled: Any) -> "Memory":
    analysis = compiled.memory_analysis()
    if analysis is None:  # some platforms do not say; then the caches alone are counted, by their shapes
      return cls(0, 0, 0)
    return cls(
      arguments=analysis.argument_size_in_bytes,
      temporaries=analysis.temp_size_in_bytes,
      results=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
    )

  @property
  def total(self) -> int:
    return self.arguments + self.temporaries + self.results


def needed(programs: Mapping[str, Memory], weights: int) -> dict[str, int]:
  """Bytes of a device, beside those of all weights, while each of `PROGRAMS` runs, by program, and those of `slots`.

  Beside a prefill there are all slots, and beside every program a batch that waits to enter; results of `enter` and
  `decode` take the place of their arguments.
  """
  prefill, enter, decode = (programs[name] for name in PROGRAMS)
  slots = enter.arguments - prefill.results
  return {
    "prefill": prefill.total + prefill.results - weights + slots,
    "enter": enter.total,
    "decode": slots + decode.temporaries + decode.results + prefill.results,
    "slots": slots,
  }


def free_memory(mesh: Mesh) -> int:
  """Bytes that are free on each of the mesh's devices, the least of all processes."""
  own = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
  stats = own[0].memory_stats()
  free = stats["bytes_limit"] - stats["bytes_in_use"] if stats else psutil.virtual_memory().available // len(own)
  return int(USABLE * processes.sum_and_least(0, free // MIB)[1]) * MIB


@contextlib.contextmanager
def refused_by_compiler() -> Iterator[None]:
  """Ends at a program whose memory the compiler refuses."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise


def most_that_fit(taken: Callable[[int], int | None], most: int, room: int, unit: int = 1) -> int:
  """The most rows that fit into a room, less at most `TOLERANCE` of them; 0 if `unit` rows do not.

  Args:
    taken: the bytes of a number of rows, nearly affine in it; None if the compiler refuses them.
    most: a multiple of `unit`, like all numbers that are tried; the first of them.
    room: bytes.
  """
  sizes: dict[int, int] = {}
  below, above, count = 0, most + unit, most
  while True:
    size = taken(count)
    if size is not None:
      sizes[count] = size
    if size is not None and size <= room:
      below = count
    else:
      above = count
    if above - below <= max(unit, below * TOLERANCE):
      return below
    guess = _count_of(room, sizes) if sizes else above * 7 // 8
    count = (guess if below < guess < above else (below + above) // 2) // unit * unit
    count = min(max(count, below + unit), above - unit)


def _count_of(room: int, sizes: Mapping[int, int]) -> int:
  """The rows that take a room, by the line through the last two sizes, or through the only one and none."""
  (a, size_a), (b, size_b) = [(0, 0), *sizes.items()][-2:]
  slope = max(1.0, (size_b - size_a) / (b - a))
  return b + math.floor((room - size_b) / slope)


class Capacity:
  """Chooses the batch sizes that are not given, for a model's programs on a mesh.

  Attributes:
    chosen: the sizes of the last prefill and of the last pool of slots.
  """

  def __init__(self, model: Model, sizes: BatchSizes, *, room: int | None = None):
    """`room` is the memory of each device that the weights leave, in bytes; what is free now if absent."""
    mesh = sharding.mesh_of(model.params)
    self._num_shards, self._kernels, self._sizes = sharding.num_shards(mesh), model.network.kernels, sizes
    self._weights = sharding.device_bytes(model.params)
    self._room = free_memory(mesh) if room is None and None in (sizes.decode, sizes.prefill) else room
    self._largest_prefill = 0  # of those whose rows were chosen, beside the weights
    self._beside_slots: int | None = None
    self.chosen = BatchSizes()

  def prefill_rows(self, num_slots: int, memory: Callable[[int], Memory | None]) -> int:
    """Rows of a prefill.

    Args:
      num_slots: of each row.
      memory: of the program for a number of rows; None if the compiler refuses it.
    """
    if self._sizes.prefill is not None:
      count = self._padded(min(self._sizes.prefill, self._sizes.decode or self._sizes.prefill))
    else:
      wanted = max(1, self._kernels.prefill_tokens // num_slots) * self._num_shards
      most = min(wanted, max(1, self._most_slots // SLOTS_PER_ROW))
      count = self._padded(1 << most.bit_length() - 1)

      def taken(count: int) -> int | None:
        own = memory(count)
        return None if own is None else own.temporaries + own.results

      room = min(self._room // PREFILL_SHARE, self._room if self._beside_slots is None else self._beside_slots)
      count = most_that_fit(taken, count, room, self._num_shards) or self._num_shards
      own = memory(count)
      if own is not None:
        self._largest_prefill = max(self._largest_prefill, own.total - self._weights)
    self.chosen = self.chosen._replace(prefill=count)
    return count

  def slots(self, num_rows: int, bytes_per_slot: int, memory: Callable[[int], Mapping[str, Memory] | None]) -> int:
    """Slots for decoding.

    Args:
      num_rows: of a prefill; there are no fewer slots.
      bytes_per_slot: of caches, on a device; at least.
      memory: of the programs for a number of slots, as for `needed`; None if the compiler refuses one.
    """
    least = self._padded(num_rows)
    if self._sizes.decode is not None:
      count = self._padded(self._sizes.decode)
    else:
      most = min(self._padded(self._most_slots), self._room // bytes_per_slot * self._num_shards)

      def taken(count: int) -> int | None:
        programs = memory(count)
        if programs is None:
          return None
        own = needed(programs, self._weights)
        taken_by_slots[count] = own["slots"]
        return max(*(own[name] for name in PROGRAMS), own["slots"] + self._largest_prefill)

      taken_by_slots: dict[int, int] = {}
      count = max(least, most_that_fit(taken, max(least, most), self._room, self._num_shards))
      if count in taken_by_slots:
        self._beside_slots = self._room - taken_by_slots[count]
    self.chosen = self.chosen._replace(decode=count)
    return count

  def describe(self) -> str:
    """The chosen sizes, and the memory from which they were chosen."""
    decode, prefill, _ = self.chosen
    room = "" if self._room is None else f"; {self._room / (1 << 30):.1f} GiB of a device beside the weights"
    return f"{decode} slots for decoding, {prefill} row{'' if prefill == 1 else 's'} in a prefill{room}"

  @property
  def _most_slots(self) -> int:
    """Slots, if memory does not matter."""
    if self._sizes.decode is not None:
      return self._sizes.decode
    most = self._kernels.most_slots * self._num_shards
    return most if self._sizes.num_rows is None else min(most, max(1, self._sizes.num_rows))

  def _padded(self, count: int) -> int:
    return -(-count // self._num_shards) * self._num_shards
