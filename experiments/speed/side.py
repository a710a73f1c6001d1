"""The sides of the comparison, each of which runs scenarios in its own process, and the weights that they share."""

import abc
import ctypes
import dataclasses
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

# In seconds: the vision tower and projector; the rest of the prefill up to the first token's logits; choosing tokens;
# one decoded token; a whole example from pixels to its last token. The first three are measured only in scenarios of
# one token, since longer ones start in the same way.
FIGURES = ("tower", "prefill", "scoring", "decode", "example")

NUM_SYSTEM_TOKENS = 35  # of LLaVA-1.5's system prompt, before the image
ALIGNMENT = 64  # bytes; JAX on CPU uses an aligned NumPy array without copying

PYTORCH = ("transformers", "authors", "authors_cache")


@dataclasses.dataclass(frozen=True)
class Scenario:
  """The prompt and output of one measurement."""

  geometry: str  # a key of `geometries.GEOMETRIES`
  num_instruction_tokens: int  # text tokens after the image
  batch_size: int  # rows, all of one layout
  num_new_tokens: int  # tokens to generate, whatever they are

  @property
  def num_text_tokens(self) -> int:
    return NUM_SYSTEM_TOKENS + self.num_instruction_tokens


@dataclasses.dataclass(frozen=True)
class Job:
  """Rows with answers of given lengths, in tokens, and how many of them are prefilled and decoded together."""

  scenario: Scenario  # of every prompt; its numbers of rows and tokens do not count
  lengths: tuple[int, ...]
  prefill: int
  decode: int


class Weights:
  """Hands out consecutive arrays from a file of random weights, and starts again at its end."""

  def __init__(self, path: pathlib.Path):
    self._bytes = np.memmap(path, dtype=np.uint8, mode="c")
    self._next = 0

  def take(self, shape: tuple[int, ...], name: str = "") -> np.ndarray:
    """A bfloat16 array mapped from the file; writing to it does not change the file.

    An array with fewer than two axes is not mapped: it is all ones, or zeros if its name ends in `bias`.
    """
    if len(shape) < 2:
      return np.full(shape, not name.endswith("bias"), ml_dtypes.bfloat16)
    size = 2 * math.prod(shape)
    if self._next + size > len(self._bytes):
      self._next = 0
    start, self._next = self._next, self._next + -(-size // ALIGNMENT) * ALIGNMENT
    return self._bytes[start : start + size].view(ml_dtypes.bfloat16).reshape(shape)


class Side(abc.ABC):
  """A way to run scenarios, one after another."""

  device: str  # its name
  mapped_bytes: int  # of the weights that are mapped from the file
  num_new_tokens: int  # that an example generates
  parts: dict[str, Callable[[], Any]]  # by figure, what is timed separately in scenarios of one token

  @abc.abstractmethod
  def prepare(self, scenario: Scenario) -> None:
    """Compiles and runs a scenario once; raises `NotImplementedError`, with the reason, if this side cannot run it."""

  @abc.abstractmethod
  def example(self) -> float:
    """Runs a whole example and returns the seconds after its first token."""

  def job(self, job: Job) -> dict[str, float]:
    """Answers all rows of a job; returns the `seconds` of it, and what else the side knows."""
    raise NotImplementedError("runs no jobs")

  @abc.abstractmethod
  def accelerator_peak(self) -> int:
    """Peak memory of an accelerator, in bytes, since the process started; 0 without one."""

  def turn(self) -> dict[str, float]:
    """Runs every figure of the prepared scenario once and returns its seconds; some figures may be missing."""
    is_prefill = self.num_new_tokens == 1
    measured = {name: seconds(part) for name, part in self.parts.items()} if is_prefill else {}
    start = time.perf_counter()
    decode = self.example()
    measured["example"] = time.perf_counter() - start
    return measured if is_prefill else measured | {"decode": decode / (self.num_new_tokens - 1)}

  def accounting(self) -> dict[str, float]:
    """Statistics after all turns: `peak_bytes`, the peak memory with every weight counted once.

    On a CPU this is the largest resident size since `reset_peak_memory`, with the file's mapped part replaced by all
    its weights.
    """
    status = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
    peak, *mapped = (int(status[name].split()[0]) << 10 for name in ("VmHWM", "RssFile", "RssShmem"))
    return {"peak_bytes": self.accelerator_peak() or peak - sum(mapped) + self.mapped_bytes}


def make(name: str, geometry: dict[str, Any], weights: pathlib.Path) -> Side:
  """The side of a name for a geometry and its weights; imports PyTorch for those that need it alone."""
  if name in PYTORCH:
    from experiments.speed import pytorch

    if name == "transformers":
      return pytorch.Transformers(geometry, weights)
    return pytorch.Authors(geometry, weights, with_cache=name == "authors_cache")
  from experiments.speed.ours import Ours

  return Ours(name, geometry, weights)


def seconds(run: Callable[[], Any]) -> float:
  """The seconds that a call takes."""
  start = time.perf_counter()
  run()
  return time.perf_counter() - start


def give_memory_back() -> None:
  """Returns the allocator's unused memory to the machine, which the sides share."""
  ctypes.CDLL("libc.so.6").malloc_trim(0)


def reset_peak_memory() -> None:
  """Resets the largest resident size that Linux has recorded for this process."""
  pathlib.Path("/proc/self/clear_refs").write_text("5")
