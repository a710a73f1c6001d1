"""Compiles programs on first use and records their costs."""

import time
from collections.abc import Callable
from typing import Any

import jax


class Recorder:
  """Makes functions that are compiled once for every form of their arguments.

  Attributes:
    compiled: all programs, in order of first use.
    seconds: time spent tracing, lowering and compiling them, or reading them from the persistent cache.
  """

  def __init__(self, *, is_abstract: bool = False):
    """If `is_abstract`, arguments are shapes, nothing runs, and calls return the shapes of results."""
    self.compiled: list[Any] = []
    self.seconds = 0.0
    self._is_abstract = is_abstract

  def jit(self, function: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled function; its keyword arguments are static and hashable."""
    programs: dict[Any, Any] = {}

    def call(*arguments: Any, **static: Any) -> Any:
      leaves, form = jax.tree.flatten(arguments)
      key = (form, tuple((leaf.shape, leaf.dtype) for leaf in leaves), tuple(static.items()))
      if key not in programs:
        start = time.perf_counter()
        programs[key] = jax.jit(lambda *arguments: function(*arguments, **static)).lower(*arguments).compile()
        self.seconds += time.perf_counter() - start
        self.compiled.append(programs[key])
      return programs[key].out_info if self._is_abstract else programs[key](*arguments)

    return call

  def account(self) -> dict[str, float]:
    """Number of programs, seconds, optimised instructions, and the most temporaries of any program, in MiB."""
    return {
      "programs": len(self.compiled),
      "compile": self.seconds,
      "instructions": sum(program.as_text().count(" = ") for program in self.compiled),
      "temporaries": max(program.memory_analysis().temp_size_in_bytes for program in self.compiled) / 2**20,
    }
