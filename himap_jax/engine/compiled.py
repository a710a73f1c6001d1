"""The programs of `programs`, compiled once for each shape of their inputs; counts and times compilations."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int, UInt

from himap_jax.engine import programs, sharding
from himap_jax.engine.capacity import Memory
from himap_jax.engine.decoding import DecodeConfig
from himap_jax.engine.prefill import PrefillState
from himap_jax.engine.sampling import Kind
from himap_jax.engine.slots import Rows, Slots
from himap_jax.inputs import Inputs
from himap_jax.model.network import Model, Network
from himap_jax.pruning.schedule import Schedule

MAX_PROGRAMS = 256  # that are kept, some ten megabytes each


@dataclasses.dataclass(frozen=True)
class ProgramKey:
  """What compiled programs depend on besides the shapes of their inputs; those after prefill on no schedule."""

  network: Network
  mesh: Mesh
  param_types: Any
  schedule: Schedule | None = None


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program."""

  run: jax.stages.Compiled

  @functools.cached_property
  def memory(self) -> Memory:
    return Memory.of(self.run)  # takes the compiler tens of milliseconds


# Compiled programs by owner, name, decode config if they depend on it, and input shapes, the last used at the end;
# shared by all engines.
_programs: dict[Any, Program] = {}


@functools.lru_cache(maxsize=64)
def _owner(key: ProgramKey) -> object:
  """Stands for a key, whose own hash takes long."""
  del key
  return object()


@functools.lru_cache(maxsize=64)
def _zeros(shapes: tuple[jax.ShapeDtypeStruct, ...]) -> Callable[[], list[jax.Array]]:
  """One program that makes arrays of zeros."""

  def zeros() -> list[jax.Array]:
    return [jnp.zeros(x.shape, x.dtype) for x in shapes]

  return jax.jit(zeros, out_shardings=[x.sharding for x in shapes])


class CompiledPrograms:
  """Runs the programs of one model, schedule and decode config.

  Attributes:
    num_programs: compiled by this object.
    seconds: of their compilation.
  """

  def __init__(self, model: Model, schedule: Schedule, decoding: DecodeConfig):
    """`decoding` is that of greedy rows."""
    self._model, self._schedule, self._decoding = model, schedule, decoding
    self._parameters = programs.method_parameters(schedule)
    self._jitted = functools.cache(functools.partial(programs.Programs, model, schedule))
    mesh, types = sharding.mesh_of(model.params), jax.tree.structure(model.params)
    after_prefill = ProgramKey(model.network, mesh, types)
    self._others_owner = _owner(after_prefill)
    self._prefills_owner = _owner(dataclasses.replace(after_prefill, schedule=schedule))
    self.num_programs, self.seconds = 0, 0.0

  def prefill(self, inputs: Inputs, seeds: UInt[Array, "B"]) -> PrefillState:
    return self._run("prefill", None, (inputs,), (self._model, inputs, seeds, self._parameters))

  def prefill_memory(self, inputs: Inputs, seeds: jax.Array | jax.ShapeDtypeStruct) -> Memory:
    """The memory of `prefill`; arguments may be `jax.ShapeDtypeStruct`s."""
    return self._ready("prefill", None, (inputs,), (self._model, inputs, seeds, self._parameters)).memory

  def memory_with_slots(self, kind: Kind, batch: tuple[PrefillState, Rows], num_slots: int) -> dict[str, Memory]:
    """The memory of `enter` and `decode` with so many slots for rows like those of a batch."""
    slots = self.slots(batch[0], num_slots)
    enter = self._ready("enter", kind, (slots.caches, batch[0]), (slots, *batch, np.bool_(False)))
    decode = self._ready("decode", kind, (slots.caches,), (self._model, slots, slots.active, np.int32(0)))
    return {"enter": enter.memory, "decode": decode.memory}

  def score(self, state: PrefillState, tokens: Int[Array, "B C"]) -> tuple[Array, Array]:
    return self._run("score", None, (state, tokens), (self._model, state, tokens))

  def enter(self, kind: Kind, slots: Slots, state: PrefillState, rows: Rows, restart: bool) -> tuple[Slots, Any]:
    return self._run("enter", kind, (slots.caches, state), (slots, state, rows, np.bool_(restart)))

  def decode(self, kind: Kind, slots: Slots, stopped: Bool[Array, "B"], num_wanted: int) -> tuple[Slots, Any]:
    return self._run("decode", kind, (slots.caches,), (self._model, slots, stopped, np.int32(num_wanted)))

  def empty_slots(self, state: PrefillState, num_slots: int) -> Slots:
    """Free slots for prompts of the shapes of `state`."""
    shapes, structure = jax.tree.flatten(self.slots(state, num_slots))
    return jax.tree.unflatten(structure, _zeros(tuple(shapes))())

  def slots(self, state: PrefillState, num_slots: int) -> Slots:
    """Their `jax.ShapeDtypeStruct`s."""
    return self._jitted(self._decoding).slots(state, num_slots)

  def _run(self, name: str, kind: Kind | None, shaped: Any, arguments: tuple[Any, ...]) -> Any:
    return self._ready(name, kind, shaped, arguments).run(*arguments)

  def _ready(self, name: str, kind: Kind | None, shaped: Any, arguments: tuple[Any, ...]) -> Program:
    """`kind` is None if it chooses no tokens, and `shaped` are those arguments whose shapes vary."""
    decoding = None if kind is None else dataclasses.replace(self._decoding, kind=kind)
    leaves, structure = jax.tree.flatten(shaped)
    owner = self._prefills_owner if name == "prefill" else self._others_owner
    key = (owner, name, decoding, structure, *((leaf.shape, leaf.dtype) for leaf in leaves))
    program = _programs.pop(key, None)
    if program is None:
      start = time.perf_counter()
      jitted = getattr(self._jitted(decoding or self._decoding), name)
      program = Program(jitted.lower(*arguments).compile())
      self.num_programs += 1
      self.seconds += time.perf_counter() - start
      logging.info("ready: %s, a program", name)
    _programs[key] = program
    while len(_programs) > MAX_PROGRAMS:
      del _programs[next(iter(_programs))]
    return program
