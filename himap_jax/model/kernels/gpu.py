"""Kernels for NVIDIA GPUs from Ampere on: cuDNN's flash attention where it applies; in Pallas, received attention.

Axes: as in `xla`.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from himap_jax.model.kernels import Devices, Kernels, masks, xla
from himap_jax.model.kernels.masks import Mask
from himap_jax.model.kernels.received import KernelConfig, received

HOPPER = 9  # compute capability
WIDEST_HEAD, WIDEST_HEAD_OF_HOPPER = 128, 256  # that cuDNN takes

MOST_HEAD_BYTES = 512  # with which blocks of 64 fit into 99 KiB, the least that a core of these GPUs has

# Triton takes powers of two alone.
RECEIVED = KernelConfig(
  block=lambda head_bytes: (64, 64) if head_bytes <= MOST_HEAD_BYTES else (32, 32),
  unrolls=False,
  padded_head_dim=pl.next_power_of_2,
  mask_dtype=jnp.int8,
  compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
)


def attention(
  query: Float[Array, "B S N H"],
  key: Float[Array, "B T K H"],
  value: Float[Array, "B T K H"],
  mask: Mask | None = None,
  *,
  is_causal: bool = False,
  segments: Int[Array, "B S"] | None = None,
  widest_head: int = WIDEST_HEAD,
) -> Float[Array, "B S N H"]:
  """cuDNN's flash attention, to which masks and segments are biases; JAX's own for other dtypes and other head dims.

  cuDNN takes a mask of floats in the dtype of the queries, and heads of `widest_head` numbers at most.
  """
  head_dim, mask = query.shape[-1], masks.in_segments(mask, segments)
  if query.dtype.itemsize != 2 or head_dim % 8 or head_dim > widest_head:
    return xla.attention(query, key, value, mask, is_causal=is_causal)
  if mask is not None and mask.dtype != bool:
    mask = mask.astype(query.dtype)
  with jax.numpy_dtype_promotion("standard"):  # it mixes dtypes inside
    return jax.nn.dot_product_attention(
      query, key, value, **masks.as_bias(mask), is_causal=is_causal, implementation="cudnn"
    )


def kernels(mesh: Mesh, spec_of: Callable[[int, int], PartitionSpec], generation: int) -> Kernels:
  """The kernels for a mesh of GPUs, the major number of whose compute capability is `generation`."""
  own = functools.partial(received, devices=Devices(mesh, spec_of), config=RECEIVED)
  widest = WIDEST_HEAD if generation < HOPPER else WIDEST_HEAD_OF_HOPPER
  return dataclasses.replace(
    xla.KERNELS,
    attention=functools.partial(attention, widest_head=widest),
    received_attention=lambda num_slots: own,
  )
