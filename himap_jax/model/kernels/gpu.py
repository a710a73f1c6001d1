"""Kernels for NVIDIA GPUs from Ampere on: cuDNN's flash attention where it applies.

Axes: as in `xla`.
"""

import dataclasses

import jax
from jaxtyping import Array, Float, Int

from himap_jax.model.kernels import masks, xla
from himap_jax.model.kernels.masks import Mask


def attention(
  query: Float[Array, "B S N H"],
  key: Float[Array, "B T K H"],
  value: Float[Array, "B T K H"],
  mask: Mask | None = None,
  *,
  is_causal: bool = False,
  segments: Int[Array, "B S"] | None = None,
) -> Float[Array, "B S N H"]:
  """cuDNN's flash attention, to which masks and segments are biases; JAX's own for other dtypes and other head dims.

  cuDNN takes a mask of floats in the dtype of the queries.
  """
  head_dim, mask = query.shape[-1], masks.in_segments(mask, segments)
  if query.dtype.itemsize != 2 or head_dim % 8 or head_dim > 128:
    return xla.attention(query, key, value, mask, is_causal=is_causal)
  if mask is not None and mask.dtype != bool:
    mask = mask.astype(query.dtype)
  with jax.numpy_dtype_promotion("standard"):  # it mixes dtypes inside
    return jax.nn.dot_product_attention(
      query, key, value, **masks.as_bias(mask), is_causal=is_causal, implementation="cudnn"
    )


KERNELS = dataclasses.replace(xla.KERNELS, attention=attention)
