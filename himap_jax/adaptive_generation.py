"""Generation with adaptive keep counts: rows begin in batches as they come and go on in batches of their rung.

Axes: B rows of a batch, V vocabulary.
"""

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from himap_jax import programs, sharding
from himap_jax.adaptive import Begun, Ladder
from himap_jax.checkpoint import LoadedModel
from himap_jax.generation import Generation, compiled_programs, row_seeds
from himap_jax.llava import Inputs
from himap_jax.sampling import Sampling


class AdaptiveGenerator:
  """Runs groups of batches through the compiled programs of one model, ladder and way of sampling.

  Attributes:
    num_programs: programs compiled so far.
    compile_seconds: time spent compiling them or reading them from the persistent cache.
  """

  def __init__(
    self,
    loaded: LoadedModel,
    ladder: Ladder,
    *,
    batch_size: int,
    num_batches: int,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    ignore_eos: bool = False,
  ):
    """Prepares the programs.

    Args:
      loaded: the model.
      ladder: the rungs, and when a row may stay on one.
      batch_size: rows of every program.
      num_batches: batches among which rows are regrouped; a call takes at most that many.
      max_new_tokens: the longest answer, in tokens.
      sampling: how tokens are chosen.
      seed: of sampling.
      ignore_eos: whether to go on to `max_new_tokens` whatever comes.
    """
    self._params = loaded.params
    self._mesh = sharding.mesh_of(loaded.params)
    self._ladder, self._seed = ladder, seed
    self._batch_size, self._num_batches = batch_size, num_batches
    eos_token_ids = () if ignore_eos else loaded.eos_token_ids
    settings = (loaded.config, self._mesh, ladder, loaded.dtype, max_new_tokens, sampling, eos_token_ids)
    self._compiled = compiled_programs(jax.tree.structure(loaded.params), num_batches, *settings)
    self.num_programs = 0
    self.compile_seconds = 0.0
    self._jitted = programs.make_ladder_programs(*settings, options=programs.compiler_options(loaded.params))

  def __call__(self, inputs: Inputs, row_ids: Sequence[int | str]) -> Generation:
    """Generates for a group of batches; the rows of the result are in their order.

    Args:
      inputs: whole batches, one after the other.
      row_ids: one a row; rows that share one are the same row, which is run once.
    """
    seeds = row_seeds(self._seed, row_ids)
    compiling = self.compile_seconds
    start = time.perf_counter()
    begun = []
    for first in range(0, len(row_ids), self._batch_size):
      rows = slice(first, first + self._batch_size)
      begun.append(self._run("begin", self._jitted.begin, self._params, *self._place((inputs, seeds), rows)))
    rungs = np.concatenate([sharding.to_local_rows(part.rung) for part in begun])
    parts = tuple(begun + [begun[-1]] * (self._num_batches - len(begun)))
    prefill_seconds = time.perf_counter() - start - (self.compile_seconds - compiling)
    first_of = {row_id: row for row, row_id in reversed(list(enumerate(row_ids)))}
    wanted = np.array(sorted(first_of.values()))
    results: dict[int, tuple[list[int], list[np.ndarray], np.ndarray]] = {}
    decode_seconds = 0.0
    for number in range(len(self._ladder.rungs)):
      own = wanted[rungs[wanted] == number]
      for first in range(0, len(own), self._batch_size):
        rows = own[first : first + self._batch_size]
        compiling, start = self.compile_seconds, time.perf_counter()
        padded = np.concatenate([rows, np.repeat(rows[-1:], self._batch_size - len(rows))])
        prefilled = self._finish(number, parts, padded)
        prefill_seconds += time.perf_counter() - start - (self.compile_seconds - compiling)
        compiling, start = self.compile_seconds, time.perf_counter()
        tokens, counts = self._decode(number, prefilled, self._place(seeds, padded))
        decode_seconds += time.perf_counter() - start - (self.compile_seconds - compiling)
        kept, logits = sharding.to_local_rows((prefilled.kept, prefilled.logits))
        for place, row in enumerate(rows.tolist()):
          answer = tokens[place, : counts[place]].tolist()
          results[row] = (answer, [stage[place] for stage in kept], logits[place])
    in_order = [results[first_of[row_id]] for row_id in row_ids]
    num_stages = len(self._ladder.rungs[0].stages)
    return Generation(
      tokens=[tokens for tokens, _, _ in in_order],
      kept=tuple([kept[stage] for _, kept, _ in in_order] for stage in range(num_stages)),
      logits=np.stack([logits for *_, logits in in_order]),
      prefill_seconds=prefill_seconds,
      decode_seconds=decode_seconds,
      rungs=rungs[[first_of[row_id] for row_id in row_ids]],
    )

  def _finish(self, number: int, parts: tuple[Begun, ...], rows: np.ndarray) -> Any:
    index = jax.device_put(jnp.asarray(rows, jnp.int32), sharding.replicated(self._mesh))
    begun = self._run("regroup", self._jitted.regroup, parts, index)
    return self._run(f"finish {number}", self._jitted.finish[number], self._params, begun)

  def _decode(self, number: int, prefilled: Any, seeds: Any) -> tuple[np.ndarray, np.ndarray]:
    arguments = (self._params, prefilled.logits, prefilled.caches, prefilled.next_position, seeds)
    return sharding.to_local_rows(self._run(f"decode {number}", self._jitted.decode[number], *arguments))

  def _place(self, tree: Any, rows: Any) -> Any:
    return sharding.from_local_rows(jax.tree.map(lambda x: np.asarray(x)[rows], tree), self._mesh)

  def _run(self, name: str, jitted: Any, *arguments: Any) -> Any:
    """Calls a program, which is compiled when it is first needed, and waits for it."""
    leaves = jax.tree.leaves(arguments[1:] if arguments[0] is self._params else arguments)
    key = (name, *(leaf.shape for leaf in leaves))
    if key not in self._compiled:
      start = time.perf_counter()
      self._compiled[key] = jitted.lower(*arguments).compile()
      self.num_programs += 1
      self.compile_seconds += time.perf_counter() - start
    return jax.block_until_ready(self._compiled[key](*arguments))
