"""The prefill and decode programs, with the shardings of their arguments and results.

Axes: B rows, S slots, M new tokens.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from himap_jax.engine import sharding
from himap_jax.engine.decoding import DecodeConfig, decode
from himap_jax.engine.prefill import PrefillState, prefill
from himap_jax.engine.scoring import score
from himap_jax.inputs import Images, ImageSize, Inputs, Layout
from himap_jax.model.config import ModelConfig
from himap_jax.model.kernels import is_quantized
from himap_jax.model.network import Model
from himap_jax.model.towers import abstract_images
from himap_jax.pruning.schedule import Schedule


class Programs(NamedTuple):
  """The two programs: jitted, lowered or compiled.

  Attributes:
    prefill: `(model, inputs, seeds, parameters)` to `PrefillState`.
    decode: `(model, state, seeds)` to tokens `[B, M]` and the number of tokens of each row `[B]`.
  """

  prefill: Any
  decode: Any


def make_programs(model: Model, mesh: Mesh, schedule: Schedule, config: DecodeConfig) -> Programs:
  """The jitted programs; the mesh must divide the model's key heads, see `sharding.with_divisible_key_heads`."""
  rows = sharding.rows(mesh)
  caches = (sharding.cache(model.config, mesh),) * schedule.num_caches
  options = _compiler_options(model)

  def prefill_program(
    model: Model, inputs: Inputs, seeds: UInt[Array, "B"], parameters: Mapping[str, Float[Array, ""]]
  ) -> PrefillState:
    return prefill(model.bind(inputs.layout.num_slots), inputs, _keys(seeds)[0], schedule, parameters)

  def decode_program(
    model: Model, state: PrefillState, seeds: UInt[Array, "B"]
  ) -> tuple[Int[Array, "B M"], Int[Array, "B"]]:
    return decode(model.bind(), state, _keys(seeds)[1], config)

  state = PrefillState(logits=rows, caches=caches, next_position=rows, next_order=rows, kept=rows)
  return Programs(
    prefill=jax.jit(prefill_program, out_shardings=state, compiler_options=options),
    decode=jax.jit(decode_program, out_shardings=(rows, rows), compiler_options=options),
  )


def make_score(model: Model, mesh: Mesh) -> Any:
  """The jitted program `(model, state, tokens [B, C])` to the results of `scoring.score`."""
  rows = sharding.rows(mesh)

  def score_program(
    model: Model, state: PrefillState, tokens: Int[Array, "B C"]
  ) -> tuple[Float[Array, "B C"], Bool[Array, "B C"]]:
    return score(model.bind(), state, tokens)

  return jax.jit(score_program, out_shardings=(rows, rows), compiler_options=_compiler_options(model))


def lower(programs: Programs, model: Model, inputs: Inputs, seeds: Any, parameters: Mapping[str, Any]) -> Programs:
  """Lowers both programs for arrays or `jax.ShapeDtypeStruct`s."""
  lowered = programs.prefill.lower(model, inputs, seeds, parameters)
  return Programs(lowered, programs.decode.lower(model, lowered.out_info, seeds))


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
    layout=Layout(slots, slots, slots, slots, num_image_tokens),
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


def _keys(seeds: UInt[Array, "B"]) -> tuple[Key[Array, "B"], Key[Array, "B"]]:
  """Random keys of each row, for its method and for sampling."""
  both = jax.vmap(jax.random.split)(jax.vmap(jax.random.key)(seeds))
  return both[:, 0], both[:, 1]
