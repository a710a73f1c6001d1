"""The two programs that answer a batch, prefill and decode, with the shardings of all that enters and leaves them.

Axes: B rows, S slots, V vocabulary.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, PyTree, UInt

from himap_jax import adaptive, attention, sharding
from himap_jax.adaptive import Begun, Ladder
from himap_jax.cache import SegmentCache
from himap_jax.config import LlavaConfig
from himap_jax.decoding import decode
from himap_jax.linear import is_quantized
from himap_jax.llava import Inputs, Llava
from himap_jax.prefill import Prefill, prefill
from himap_jax.sampling import Sampling
from himap_jax.schedule import Schedule


class Programs(NamedTuple):
  """Jitted functions, or what became of them when they were lowered or compiled.

  Attributes:
    prefill: `(params, inputs, seeds)` to `Prefill`.
    decode: `(params, logits, caches, next_position, seeds)` to tokens `[B, M]`, and how many of each row count `[B]`.
  """

  prefill: Any
  decode: Any


def make_programs(
  config: LlavaConfig,
  mesh: Mesh,
  schedule: Schedule,
  dtype: Any,
  max_new_tokens: int,
  sampling: Sampling = Sampling(),
  eos_token_ids: tuple[int, ...] = (),
  *,
  options: dict[str, str] | None = None,
) -> Programs:
  """The programs of one way to answer.

  Args:
    config: the model, with key heads that the mesh divides (`sharding.with_divisible_key_heads`).
    mesh: the devices.
    schedule: what happens to the image tokens.
    dtype: of activations.
    max_new_tokens: the longest answer, in tokens.
    sampling: how tokens are chosen.
    eos_token_ids: tokens that end a row.
    options: of the compiler; see `compiler_options`.
  """
  model = Llava(config, dtype, attention.for_mesh(mesh))
  rows, caches = sharding.rows(mesh), (sharding.cache(config, mesh),) * schedule.num_caches

  def prefill_program(params: PyTree, inputs: Inputs, seeds: UInt[Array, "B"]) -> Prefill:
    keys, _ = _keys(seeds)
    return prefill(model, params, inputs, keys, schedule)

  def decode_program(
    params: PyTree,
    logits: Float[Array, "B V"],
    caches: tuple[SegmentCache, ...],
    next_position: Int[Array, "B"],
    seeds: UInt[Array, "B"],
  ) -> Any:
    _, keys = _keys(seeds)
    return decode(
      model,
      params,
      logits,
      caches,
      next_position,
      keys,
      max_new_tokens=max_new_tokens,
      sampling=sampling,
      eos_token_ids=eos_token_ids,
    )

  return Programs(
    prefill=jax.jit(
      prefill_program,
      out_shardings=Prefill(logits=rows, caches=caches, next_position=rows, kept=rows),
      compiler_options=options,
    ),
    decode=jax.jit(decode_program, out_shardings=(rows, rows), compiler_options=options),
  )


class LadderPrograms(NamedTuple):
  """Jitted functions of adaptive keep counts.

  Attributes:
    begin: `(params, inputs, seeds)` to `adaptive.Begun`.
    regroup: `(tuple of Begun, rows)` to the `Begun` of these rows.
    finish: for each rung `(params, begun)` to `Prefill`.
    decode: for each rung as in `Programs`.
  """

  begin: Any
  regroup: Any
  finish: tuple[Any, ...]
  decode: tuple[Any, ...]


def make_ladder_programs(
  config: LlavaConfig,
  mesh: Mesh,
  ladder: Ladder,
  dtype: Any,
  max_new_tokens: int,
  sampling: Sampling = Sampling(),
  eos_token_ids: tuple[int, ...] = (),
  *,
  options: dict[str, str] | None = None,
) -> LadderPrograms:
  """The programs of a ladder; arguments as in `make_programs`."""
  model = Llava(config, dtype, attention.for_mesh(mesh))
  rows, cache = sharding.rows(mesh), sharding.cache(config, mesh)
  begun = Begun(x=rows, positions=rows, layout=rows, order=rows, cache=cache, keys=rows, rung=rows)

  def begin_program(params: PyTree, inputs: Inputs, seeds: UInt[Array, "B"]) -> Begun:
    keys, _ = _keys(seeds)
    return adaptive.begin(model, params, inputs, keys, ladder)

  def finish_program(rung: Schedule) -> Any:
    return jax.jit(
      lambda params, begun: adaptive.finish(model, params, begun, rung),
      out_shardings=Prefill(logits=rows, caches=(cache,) * rung.num_caches, next_position=rows, kept=rows),
      compiler_options=options,
    )

  return LadderPrograms(
    begin=jax.jit(begin_program, out_shardings=begun, compiler_options=options),
    regroup=jax.jit(adaptive.regroup, out_shardings=begun),
    finish=tuple(map(finish_program, ladder.rungs)),
    decode=tuple(
      make_programs(config, mesh, rung, dtype, max_new_tokens, sampling, eos_token_ids, options=options).decode
      for rung in ladder.rungs
    ),
  )


def lower(programs: Programs, params: PyTree, inputs: Inputs, seeds: UInt[Array, "B"]) -> Programs:
  """Lowers both programs for the shapes and shardings of arrays or of `jax.ShapeDtypeStruct`s."""
  lowered = programs.prefill.lower(params, inputs, seeds)
  result = lowered.out_info
  return Programs(lowered, programs.decode.lower(params, result.logits, result.caches, result.next_position, seeds))


def abstract_inputs(
  config: LlavaConfig, mesh: Mesh, *, batch_size: int, num_text_slots: int, image_shape: tuple[int, int]
) -> tuple[Inputs, UInt[Array, "B"]]:
  """The inputs and seeds of a batch as `jax.ShapeDtypeStruct`s."""

  def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=sharding.rows(mesh))

  num_slots = num_text_slots + config.num_image_tokens(*image_shape)
  inputs = Inputs(
    tokens=array((num_slots,), jnp.int32),
    length=array((), jnp.int32),
    image_start=array((), jnp.int32),
    pixel_values=array((3, *image_shape), jnp.float32),
  )
  return inputs, array((), jnp.uint32)


def compiler_options(params: Any) -> dict[str, str]:
  """What XLA is told about the programs of these parameters."""
  on_cpu = sharding.mesh_of(params).devices.flat[0].platform == "cpu"
  if on_cpu and any(map(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized))):
    # It would convert all quantised weights as soon as a program begins, and hold them all.
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
  return {}


def _keys(seeds: UInt[Array, "B"]) -> tuple[Key[Array, "B"], Key[Array, "B"]]:
  """A key of each row for its method and one for sampling."""
  both = jax.vmap(jax.random.split)(jax.vmap(jax.random.key)(seeds))
  return both[:, 0], both[:, 1]
