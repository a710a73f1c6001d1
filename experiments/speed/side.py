"""What is compared: a side runs a scenario, in a process of its own."""

import abc
import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping
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
    num_new_tokens: tokens that an example generates.
    parts: runs what is timed on its own in scenarios of one token, by figure.
  """

  num_new_tokens: int
  parts: Mapping[str, Callable[[], Any]]

  @abc.abstractmethod
  def device(self) -> str:
    """What it runs on."""

  @abc.abstractmethod
  def set_up(self, scenario: Scenario) -> None:
    """Makes what the scenario needs; `NotImplementedError` says why this side cannot run it."""

  @abc.abstractmethod
  def example(self) -> float:
    """Runs a whole example; returns its seconds after the first token."""

  @abc.abstractmethod
  def peak_bytes(self) -> int:
    """The most memory held while turns were taken, every weight counted once; on an accelerator, since its process began."""

  def accounting(self) -> dict[str, float]:
    """What is known of the programs of the scenario without running them."""
    return {}

  def prepare(self, scenario: Scenario) -> None:
    """Compiles what a scenario needs and runs it once; two tokens of it where nothing is compiled."""
    self.num_new_tokens = min(2, scenario.num_new_tokens)
    self.set_up(scenario)
    self.turn()
    self.num_new_tokens = scenario.num_new_tokens
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # Linux forgets the largest resident size so far

  def turn(self) -> dict[str, float]:
    """Runs every figure of the scenario once and gives its seconds."""
    is_single = self.num_new_tokens == 1
    figures = {name: seconds(part) for name, part in self.parts.items()} if is_single else {}
    start = time.perf_counter()
    decode_seconds = self.example()
    figures["example"] = time.perf_counter() - start
    return figures if is_single else figures | {"decode": decode_seconds / (self.num_new_tokens - 1)}


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


def peak_memory(mapped_weights: int) -> int:
  """The largest resident size of this process since it was prepared, in bytes.

  The weights that lie in the file, `mapped_weights` bytes, are counted in full in place of what of it is mapped.
  """
  status = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
  kibibytes = {name: int(status[name].split()[0]) for name in ("VmHWM", "RssFile", "RssShmem")}
  return ((kibibytes["VmHWM"] - kibibytes["RssFile"] - kibibytes["RssShmem"]) << 10) + mapped_weights
