"""The programs of prefill, of entering slots, of decoding and of scoring, with the shardings of their results.

Axes: B rows or slots, C tokens of a continuation.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt

from himap_jax.engine import sharding
from himap_jax.engine.decoding import DecodeConfig, Decoded, decode, enter
from himap_jax.engine.prefill import PrefillState, prefill
from himap_jax.engine.sampling import row_keys
from himap_jax.engine.scoring import score
from himap_jax.engine.slots import Entered, Rows, Slots
from himap_jax.engine.slots import shapes as slot_shapes
from himap_jax.inputs import Images, ImageSize, Inputs, Layout
from himap_jax.model.cache import NewTokens
from himap_jax.model.config import ModelConfig
from himap_jax.model.kernels import is_quantized
from himap_jax.model.network import Model
from himap_jax.model.towers import abstract_images
from himap_jax.pruning.schedule import Schedule


class Lowered(NamedTuple):
  """The programs for some shapes, as jitted by `Programs`; before or after their compilation."""

  prefill: Any
  enter: Any
  decode: Any


class Programs:
  """The jitted programs of a model, a schedule and a decode config.

  Attributes:
    prefill: `(model, inputs, seeds, parameters)` to `PrefillState`.
    enter: `(slots, state, rows, restart)` to `Slots`, in place of those given, and `Entered`.
    decode: `(model, slots, stopped, num_wanted)` to `Slots`, in place of those given, and `Decoded`.
    score: `(model, state, tokens [B, C])` to the results of `scoring.score`.
  """

  def __init__(self, model: Model, schedule: Schedule, config: DecodeConfig):
    """The model's mesh must divide its key heads, see `sharding.with_divisible_key_heads`; its arrays may be abstract."""
    mesh = sharding.mesh_of(model.params)
    config = dataclasses.replace(config, num_shards=sharding.num_shards(mesh))
    self._model, self._config = model, config
    rows, replicated, cache = sharding.rows(mesh), sharding.replicated(mesh), sharding.cache(model.config, mesh)
    caches = (cache,) * schedule.num_caches

    def prefill_program(
      model: Model, inputs: Inputs, seeds: UInt[Array, "B"], parameters: Mapping[str, Float[Array, ""]]
    ) -> PrefillState:
      return prefill(model.bind(inputs.layout.num_slots), inputs, row_keys(seeds)[0], schedule, parameters)

    def enter_program(slots: Slots, state: PrefillState, rows: Rows, restart: Bool[Array, ""]) -> tuple[Slots, Entered]:
      return enter(slots, state, rows, restart, config)

    def decode_program(
      model: Model, slots: Slots, stopped: Bool[Array, "B"], num_wanted: Int[Array, ""]
    ) -> tuple[Slots, Decoded]:
      return decode(model.bind(), slots, stopped, num_wanted, config)

    def score_program(
      model: Model, state: PrefillState, tokens: Int[Array, "B C"]
    ) -> tuple[Float[Array, "B C"], Bool[Array, "B C"]]:
      return score(model.bind(), state, tokens)

    self._slots = Slots(caches, NewTokens(cache.keys, cache.keys, rows, replicated), *(rows,) * 6)
    state = PrefillState(logits=rows, caches=caches, next_position=rows, next_order=rows, kept=rows, ranks=rows)
    decoded = Decoded(rows, rows, rows, rows, replicated)
    options = _compiler_options(model)
    self.prefill = jax.jit(prefill_program, out_shardings=state, compiler_options=options)
    self.enter = jax.jit(enter_program, out_shardings=(self._slots, rows), donate_argnums=0)
    self.decode = jax.jit(
      decode_program, out_shardings=(self._slots, decoded), donate_argnums=1, compiler_options=options
    )
    self.score = jax.jit(score_program, out_shardings=(rows, rows), compiler_options=options)

  def slots(self, state: PrefillState, num_slots: int) -> Slots:
    """`jax.ShapeDtypeStruct`s of slots for prompts of the shapes of `state`."""
    network = self._model.network
    shapes = slot_shapes(state, num_slots, self._config.num_new, network.kernels.new_token_dtype(network.dtype))
    shardings = jax.tree.broadcast(self._slots, shapes)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)

  def lower(self, inputs: Inputs, seeds: Any, parameters: Mapping[str, Any], num_slots: int) -> Lowered:
    """Lowers the programs for arrays or `jax.ShapeDtypeStruct`s."""
    prefill = self.prefill.lower(self._model, inputs, seeds, parameters)
    slots = self.slots(prefill.out_info, num_slots)
    rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct(seeds.shape, x.dtype, sharding=x.sharding), slots.rows)
    num_wanted, restart = (jax.ShapeDtypeStruct((), dtype) for dtype in (jnp.int32, bool))
    return Lowered(
      prefill,
      self.enter.lower(slots, prefill.out_info, rows, restart),
      self.decode.lower(self._model, slots, slots.active, num_wanted),
    )


def abstract_inputs(
  config: ModelConfig,
  mesh: Mesh,
  *,
  batch_size: int,
  num_text_slots: int,
  image_shape: tuple[int, int],
  size: ImageSize | None = None,
) -> tuple[Inputs, jax.ShapeDtypeStruct]:
  """Inputs and seeds of a batch of prompts, as `jax.ShapeDtypeStruct`s.

  Args:
    image_shape: `(height, width)` of a tile, in pixels.
    size: of a row's pictures; by default one picture of one tile.
  """

  def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=sharding.rows(mesh))

  images = abstract_images(config.vision, *image_shape)
  num_tiles, num_image_tokens = size or (len(images.pixels), config.num_image_tokens(*image_shape))
  slots, taps = array((num_text_slots + num_image_tokens,), jnp.int32), (num_image_tokens, config.num_taps)
  axes = (len(config.text.rope.sections),) if config.text.rope.sections else ()
  inputs = Inputs(
    tokens=slots,
    layout=Layout(slots, slots, slots, slots, array(slots.shape[1:], jnp.bool_), num_image_tokens),
    positions=array((*slots.shape[1:], *axes), jnp.int32),
    images=Images(
      array((num_tiles, *images.pixels.shape[1:]), jnp.float32),
      coordinates=None if images.coordinates is None else array((num_tiles, 3), jnp.int32),
      pack_index=array(taps, jnp.int32) if config.has_newline else None,
      pack_weight=array(taps, jnp.float32) if config.num_taps > 1 else None,
    ),
  )
  return inputs, array((), jnp.uint32)


def method_parameters(schedule: Schedule) -> dict[str, np.float32]:
  """The parameters of a schedule's methods as inputs of a prefill program."""
  return {name: np.float32(value) for name, value in schedule.parameters}


def _compiler_options(model: Model) -> dict[str, str]:
  leaves = jax.tree.leaves(model.params, is_leaf=is_quantized)
  return dict(model.network.kernels.int8_compiler_options) if any(map(is_quantized, leaves)) else {}
