"""What is compared: a side runs a scenario, in a process of its own."""

import abc
import ctypes
import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any

# Seconds of each: the vision tower and projector; the rest of the prefill up to the first token's logits; choosing tokens;
# one decoded token; a whole example from pixels to its last token. The first three are measured in scenarios of one token:
# those of more begin in the same way.
FIGURES = ("tower", "prefill", "scoring", "decode", "example")

NUM_SYSTEM_TOKENS = 35  # of LLaVA-1.5's system prompt, before the image

PYTORCH = ("transformers", "authors", "authors_cache")


@dataclasses.dataclass(frozen=True)
class Scenario:
  """One measurement's prompt and output.

  Attributes:
    geometry: a key of `geometries.GEOMETRIES`.
    num_instruction_tokens: text tokens after the image.
    batch_size: rows, all alike.
    num_new_tokens: tokens generated, whatever they are.
  """

  geometry: str
  num_instruction_tokens: int
  batch_size: int
  num_new_tokens: int

  @property
  def num_text_tokens(self) -> int:
    """System prompt and instruction."""
    return NUM_SYSTEM_TOKENS + self.num_instruction_tokens


class Side(abc.ABC):
  """One way to run scenarios, one after the other.

  Attributes:
    device: what it runs on.
    mapped_bytes: of the weights that lie in the file.
    num_new_tokens: that an example generates.
    parts: what is timed on its own where that is one token, by figure.
  """

  device: str
  mapped_bytes: int
  num_new_tokens: int
  parts: dict[str, Callable[[], Any]]

  @abc.abstractmethod
  def prepare(self, scenario: Scenario) -> None:
    """Compiles what the scenario needs, and runs it once.

    Raises:
      NotImplementedError: this side cannot run it; the message says why.
    """

  @abc.abstractmethod
  def example(self) -> float:
    """Runs a whole example and gives its seconds after the first token."""

  @abc.abstractmethod
  def accelerator_peak(self) -> int:
    """The most bytes that an accelerator held since the process began; 0 where there is none."""

  def turn(self) -> dict[str, float]:
    """Runs every figure of the prepared scenario once and gives its seconds; some figures may be missing."""
    is_prefill = self.num_new_tokens == 1
    measured = {name: seconds(part) for name, part in self.parts.items()} if is_prefill else {}
    start = time.perf_counter()
    decode = self.example()
    measured["example"] = time.perf_counter() - start
    return measured if is_prefill else measured | {"decode": decode / (self.num_new_tokens - 1)}

  def accounting(self) -> dict[str, float]:
    """`peak_bytes`, the most memory held while turns were taken, every weight counted once; and what programs say of themselves.

    On a CPU it is the largest resident size since `reset_peak_memory`, with the weights of the file in full in place of what of
    it is mapped.
    """
    status = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
    peak, *mapped = (int(status[name].split()[0]) << 10 for name in ("VmHWM", "RssFile", "RssShmem"))
    return {"peak_bytes": self.accelerator_peak() or peak - sum(mapped) + self.mapped_bytes}


def make(name: str, geometry: dict[str, Any], weights: pathlib.Path) -> Side:
  """Builds a side; only the package that it needs is imported."""
  if name in PYTORCH:
    from experiments.speed import pytorch

    if name == "transformers":
      return pytorch.Transformers(geometry, weights)
    return pytorch.Authors(geometry, weights, with_cache=name == "authors_cache")
  from experiments.speed.ours import Ours

  return Ours(name, geometry, weights)


def seconds(run: Callable[[], Any]) -> float:
  """Wall time of a call."""
  start = time.perf_counter()
  run()
  return time.perf_counter() - start


def give_memory_back() -> None:
  """Returns what the allocator holds and nothing uses: the sides share the machine's memory."""
  ctypes.CDLL("libc.so.6").malloc_trim(0)


def reset_peak_memory() -> None:
  """Has Linux forget this process's largest resident size so far."""
  pathlib.Path("/proc/self/clear_refs").write_text("5")
