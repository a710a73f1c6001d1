"""Attention that slots receive from some rows, in one Pallas kernel: no row's attention leaves a core's own memory.

Axes: B batch, Q rows, T slots, N query heads, K key heads, H head dim, n blocks of rows, R rows of a block.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from himap_jax.inputs import pad_to
from himap_jax.model.kernels import HIDDEN, Devices


@dataclasses.dataclass(frozen=True)
class KernelConfig:
  """How the kernel is built for a platform.

  Attributes:
    block: from the bytes of a padded head to the rows and slots of a block.
    unrolls: whether its loop over blocks of slots is unrolled.
    padded_head_dim: from the head dim to the one to which heads are padded.
    mask_dtype: dtype in which it reads what rows see.
    compiler_params: of `pallas_call`.
  """

  block: Callable[[int], tuple[int, int]] = lambda head_bytes: (64, 128)
  unrolls: bool = True
  padded_head_dim: Callable[[int], int] = lambda head_dim: head_dim
  mask_dtype: Any = jnp.int32
  compiler_params: Any = None


def received(
  query: Float[Array, "B Q N H"],
  key: Float[Array, "B T K H"],
  visible: Bool[Array, "B Q T"],
  valid: Bool[Array, "B Q"],
  scale: float,
  *,
  devices: Devices,
  config: KernelConfig,
) -> Float[Array, "B T"]:
  """Attention that slots receive from the valid rows, summed over rows, averaged over heads, on all devices."""
  num_heads, (mesh, spec_of, interpret) = query.shape[2], devices
  batch, heads = spec_of(num_heads, key.shape[2])

  def of_own_heads(*arguments: Array) -> Float[Array, "B T"]:
    own = received_from_heads(*arguments, scale, config=config, interpret=interpret)
    return jax.lax.psum(own, heads) if heads else own

  by_head, by_row = PartitionSpec(batch, None, heads), PartitionSpec(batch)
  program = jax.shard_map(
    of_own_heads, mesh=mesh, in_specs=(by_head, by_head, by_row, by_row), out_specs=by_row, check_vma=False
  )
  return program(query, key, visible, valid) / num_heads


def received_from_heads(
  query: Float[Array, "B Q N H"],
  key: Float[Array, "B T K H"],
  visible: Bool[Array, "B Q T"],
  valid: Bool[Array, "B Q"],
  scale: float,
  *,
  config: KernelConfig,
  interpret: bool = False,
) -> Float[Array, "B T"]:
  """As `received`, summed over heads, on one device.

  Every program of the grid takes a block of rows of one head, and goes over the slots twice: for the maximum and the
  sum of the row's weights, and for what the slots receive.
  """
  batch, _, num_heads, head_dim = query.shape
  num_slots, group, head_dim = key.shape[1], num_heads // key.shape[2], config.padded_head_dim(head_dim)
  rows, slots = config.block(head_dim * query.dtype.itemsize)
  query = pad_to(jnp.swapaxes(query, 1, 2), {2: rows, 3: head_dim})
  key = pad_to(jnp.swapaxes(key, 1, 2), {2: slots, 3: head_dim})
  visible = pad_to(visible.astype(config.mask_dtype), {1: rows, 2: slots})
  weight = pad_to(valid.astype(jnp.float32)[:, :, None], {1: rows})
  padded, num_blocks = key.shape[2], query.shape[2] // rows
  by_block = pl.pallas_call(
    functools.partial(_block, scale=scale, config=config),
    grid=(batch, num_heads, num_blocks),
    in_specs=[
      pl.BlockSpec((None, None, rows, head_dim), lambda b, head, block: (b, head, block, 0)),
      pl.BlockSpec((None, None, padded, head_dim), lambda b, head, block: (b, jax.lax.div(head, group), 0, 0)),
      pl.BlockSpec((None, rows, padded), lambda b, head, block: (b, block, 0)),
      pl.BlockSpec((None, rows, 1), lambda b, head, block: (b, block, 0)),
    ],
    out_specs=pl.BlockSpec((None, None, None, 1, padded), lambda b, head, block: (b, head, block, 0, 0)),
    out_shape=jax.ShapeDtypeStruct((batch, num_heads, num_blocks, 1, padded), jnp.float32),
    name="received_attention",
    compiler_params=config.compiler_params,
    interpret=interpret,
  )(query, key, visible, weight)
  return by_block.sum(axis=(1, 2, 3))[:, :num_slots]


def _block(
  query_ref: Any,
  key_ref: Any,
  visible_ref: Any,
  weight_ref: Any,
  received_ref: Any,
  *,
  scale: float,
  config: KernelConfig,
) -> None:
  query = query_ref[...]
  _, num_slots = config.block(query.shape[1] * query.dtype.itemsize)
  num_blocks = key_ref.shape[0] // num_slots
  unroll = num_blocks if config.unrolls else 1

  def block(number: Int[Array, ""]) -> Any:
    return pl.ds(number * num_slots, num_slots)

  def logits(slots: Any) -> Float[Array, "R T"]:
    products = jax.lax.dot_general(
      query, key_ref[slots, :], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    return jnp.where(visible_ref[:, slots] != 0, products * scale, HIDDEN)

  def add(
    number: Int[Array, ""], before: tuple[Float[Array, "R 1"], Float[Array, "R 1"]]
  ) -> tuple[Float[Array, "R 1"], Float[Array, "R 1"]]:
    (highest, total), own = before, logits(block(number))
    now = jnp.maximum(highest, own.max(axis=1, keepdims=True))
    return now, total * jnp.exp(highest - now) + jnp.exp(own - now).sum(axis=1, keepdims=True)

  nothing = jnp.full((len(query), 1), HIDDEN, jnp.float32), jnp.zeros((len(query), 1), jnp.float32)
  highest, total = jax.lax.fori_loop(0, num_blocks, add, nothing, unroll=unroll)
  share = weight_ref[...] / total

  def write(number: Int[Array, ""], _: None) -> None:
    slots = block(number)
    received_ref[:, slots] = (jnp.exp(logits(slots) - highest) * share).sum(axis=0, keepdims=True)

  jax.lax.fori_loop(0, num_blocks, write, None, unroll=unroll)
