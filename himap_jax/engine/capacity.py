"""How many rows fit into the devices' memory, by the compiler's own analysis of the programs.

A prefill takes as many rows as its products need for their full speed, in a part of the memory that the weights leave.
Slots for decoding get the rest. Sizes that are given are the most: rows that are too long for them get fewer.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from himap_jax.engine import host_memory, processes, sharding
from himap_jax.errors import UserError
from himap_jax.model.network import Model

PROGRAMS = ("prefill", "enter", "decode")
PREFILL_SHARE = 4  # of the memory that the weights leave, a prefill takes at most one part in so many
SLOTS_PER_ROW = 8  # at least so many for each row of a prefill: slots wait until there are as many free ones
MIB, GIB = 1 << 20, 1 << 30
TOLERANCE = 1 / 32
USABLE = 0.9  # of the memory that is free; the rest is for fragmentation, and on CPU for other programs


class BatchSizes(NamedTuple):
  """The most rows over all processes, rounded up to multiples of the mesh's `data` axis; absent ones are chosen.

  Attributes:
    decode: slots.
    prefill: rows that are prefilled together, at most as many as there are slots.
    num_rows: rows to answer, at most; no more slots are chosen.
  """

  decode: int | None = None
  prefill: int | None = None
  num_rows: int | None = None

  def at_most(self, num_rows: int) -> "BatchSizes":
    """The same sizes, but none that is given above a number of rows."""
    decode, prefill = (None if own is None else min(own, num_rows) for own in (self.decode, self.prefill))
    return self._replace(decode=decode, prefill=prefill)


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

  def beside(self, weights: int) -> int:
    """Bytes beside those of all weights, of which the program may take a part, as it does for text alone."""
    return max(0, self.arguments - weights) + self.temporaries + self.results


def needed(programs: Mapping[str, Memory], weights: int) -> dict[str, int]:
  """Bytes of a device, beside those of all weights, while each of `PROGRAMS` runs, by program, and those of `slots`.

  Beside a prefill there are all slots, and beside every program a batch that waits to enter; results of `enter` and
  `decode` take the place of their arguments.
  """
  prefill, enter, decode = (programs[name] for name in PROGRAMS)
  slots = enter.arguments - prefill.results
  return {
    "prefill": prefill.beside(weights) + prefill.results + slots,
    "enter": enter.total,
    "decode": slots + decode.temporaries + decode.results + prefill.results,
    "slots": slots,
  }


def free_memory(mesh: Mesh) -> int:
  """Bytes that are free on each of the mesh's devices, the minimum over processes."""
  own = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
  stats = own[0].memory_stats()
  free = stats["bytes_limit"] - stats["bytes_in_use"] if stats else host_memory.available() // len(own)
  return int(USABLE * processes.sum_and_min(0, free // MIB)[1]) * MIB


@contextlib.contextmanager
def refused_by_compiler() -> Iterator[None]:
  """Leaves the block, without an error, at a program that does not fit into memory according to the compiler."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if not is_out_of_memory(error):
      raise


def is_out_of_memory(error: jax.errors.JaxRuntimeError) -> bool:
  """Whether a device, or the compiler for it, had too little memory."""
  return "RESOURCE_EXHAUSTED" in str(error)


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
    self._room = free_memory(mesh) if room is None else room
    self._largest_prefill = 0  # beside the weights
    self._beside_slots: int | None = None
    self.chosen = BatchSizes()

  def prefill_rows(self, num_slots: int, memory: Callable[[int], Memory | None]) -> int:
    """Rows of a prefill.

    Args:
      num_slots: of each row.
      memory: of the program for a number of rows; None if the compiler refuses it.

    Raises:
      UserError: the memory does not hold one row on each device.
    """

    def taken(count: int) -> int | None:
      own = memory(count)
      return None if own is None else own.temporaries + own.results

    def taken_alone(count: int) -> int | None:
      own = memory(count)
      return None if own is None else own.temporaries + 2 * own.results  # which are copied to slots

    least = self._num_shards
    if self._sizes.prefill is not None:
      most = self._padded(min(self._sizes.prefill, self._sizes.decode or self._sizes.prefill))
      count = most_that_fit(taken_alone, most, self._room, least)
    else:
      wanted = max(1, self._kernels.prefill_tokens // num_slots) * self._num_shards
      most = min(wanted, max(1, self._most_slots // SLOTS_PER_ROW))
      room = min(self._room // PREFILL_SHARE, self._room if self._beside_slots is None else self._beside_slots)
      count = most_that_fit(taken, self._padded(1 << most.bit_length() - 1), room, least)
      count = count or most_that_fit(taken_alone, least, self._room, least)
    if not count:
      size = taken_alone(least)
      wanted = "more" if size is None else f"{size / GIB:.3g} GiB"
      raise UserError(
        f"a prompt of {num_slots} tokens, padding included, needs {wanted} of a device's memory, and {self._room / GIB:.3g} "
        "GiB are free beside the weights; fewer pictures, --max_image_tokens where a picture's size decides how many it has, "
        "or finer --prompt_buckets make it shorter"
      )
    own = memory(count)
    if own is not None:
      self._largest_prefill = max(self._largest_prefill, own.beside(self._weights))
    self.chosen = self.chosen._replace(prefill=count)
    return count

  def fits_beside_slots(self, prefill: Memory) -> bool:
    """Whether a prefill can run while there are the slots that were chosen last."""
    return self._beside_slots is None or prefill.beside(self._weights) <= self._beside_slots

  def slots(self, num_rows: int, bytes_per_slot: int, memory: Callable[[int], Mapping[str, Memory] | None]) -> int:
    """Slots for decoding.

    Args:
      num_rows: of a prefill; there are no fewer slots.
      bytes_per_slot: of caches, on a device; at least.
      memory: of the programs for a number of slots, as for `needed`; None if the compiler refuses one.
    """
    least = self._padded(min(num_rows, self._sizes.decode or num_rows))
    most = min(self._padded(self._most_slots), self._room // bytes_per_slot * self._num_shards)
    taken_by_slots: dict[int, int] = {}

    def taken(count: int) -> int | None:
      programs = memory(count)
      if programs is None:
        return None
      own = needed(programs, self._weights)
      taken_by_slots[count] = own["slots"]
      return max(*(own[name] for name in PROGRAMS), own["slots"] + self._largest_prefill)

    count = max(least, most_that_fit(taken, max(least, most), self._room, self._num_shards))
    self._beside_slots = self._room - taken_by_slots[count] if count in taken_by_slots else 0
    self.chosen = self.chosen._replace(decode=count)
    return count

  def describe(self) -> str:
    """The chosen sizes, and the memory from which they were chosen."""
    decode, prefill, _ = self.chosen
    rows = f"{decode} slots for decoding, {prefill} row{'' if prefill == 1 else 's'} in a prefill"
    return f"{rows}; {self._room / GIB:.1f} GiB of a device beside the weights"

  @property
  def _most_slots(self) -> int:
    """Slots, if memory does not matter."""
    if self._sizes.decode is not None:
      return self._sizes.decode
    most = self._kernels.most_slots * self._num_shards
    return most if self._sizes.num_rows is None else min(most, max(1, self._sizes.num_rows))

  def _padded(self, count: int) -> int:
    return -(-count // self._num_shards) * self._num_shards
