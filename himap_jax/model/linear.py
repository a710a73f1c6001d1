"""Linear and normalisation layers.

Axes: B batch, S sequence, D in features, F out features.

Weights are stored as in a Hugging Face checkpoint, `[F, D]`: loading copies them unchanged, and a product of few rows
reads them along their contiguous axis.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from himap_jax.model.kernels import Kernels, is_quantized

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  "gelu": lambda x: nn.gelu(x, approximate=False),
  "gelu_new": nn.gelu,
  "gelu_pytorch_tanh": nn.gelu,
  "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
  "relu": nn.relu,
  "silu": nn.silu,
}

# Jitted, so that they are traced once a shape: Flax traces a parameter's initialiser at every use to check its shape.
INIT_LINEAR = jax.jit(nn.initializers.lecun_normal(in_axis=1, out_axis=0), static_argnums=1)
INIT_NORMAL = jax.jit(nn.initializers.normal(0.02), static_argnums=1)

# `[F, D]`, or a `qwix.QArray` of that shape.
Weight = Any

# Logical names of a weight's axes, out features first; None for an axis that is never sharded.
WeightAxes = tuple[str | None, str | None]


def cast(weight: Weight, dtype: Any) -> Weight:
  """Casts a weight to the dtype of a product; quantised weights are unchanged."""
  return weight if is_quantized(weight) else weight.astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: Float[Array, "B S D"], weight: Weight, kernels: Kernels) -> Float[Array, "B S F"]:
  """`x · weightᵀ` accumulated in float32 and returned in `x.dtype`; gradients accumulate in float32 too."""
  return kernels.product(x, weight).astype(x.dtype)


def _matmul_forward(x: Array, weight: Array, kernels: Kernels) -> tuple[Array, tuple[Array, Array]]:
  return matmul(x, weight, kernels), (x, weight)


def _matmul_backward(kernels: Kernels, residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
  x, weight = residuals
  dx = jnp.einsum("BSF,FD->BSD", g, weight, preferred_element_type=jnp.float32)
  return dx.astype(x.dtype), kernels.weight_gradient(g, x).astype(weight.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


class Linear(nn.Module):
  """An affine map with a weight of shape `[features, D]`."""

  features: int
  kernels: Kernels
  use_bias: bool = False
  axes: WeightAxes = (None, None)

  @nn.compact
  def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S F"]:
    init = nn.with_logical_partitioning(INIT_LINEAR, self.axes)
    weight = self.param("weight", init, (self.features, x.shape[-1]))
    y = matmul(x, cast(weight, x.dtype), self.kernels)
    if self.use_bias:
      init = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[:1])
      bias = self.param("bias", init, (self.features,))
      y = y + jnp.broadcast_to(bias.astype(x.dtype), y.shape)
    return y


class Embedding(nn.Module):
  """A table of `num_embeddings` vectors."""

  num_embeddings: int
  features: int
  kernels: Kernels
  axes: WeightAxes = (None, None)

  def setup(self) -> None:
    init = nn.with_logical_partitioning(INIT_NORMAL, self.axes)
    self.weight = self.param("weight", init, (self.num_embeddings, self.features))

  def __call__(self, ids: Int[Array, "*I"]) -> Float[Array, "*I D"]:
    return self.kernels.take_rows(self.weight, ids)


class RMSNorm(nn.Module):
  """Root-mean-square normalisation in float32 (Zhang and Sennrich, arXiv 1910.07467).

  With `offset` the factor is 1 + weight, multiplied in float32 (Gemma, arXiv 2403.08295).
  """

  epsilon: float
  offset: bool = False

  @nn.compact
  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    weight = self.param("weight", nn.initializers.zeros if self.offset else nn.initializers.ones, (x.shape[-1],))
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
    if self.offset:
      return (jnp.broadcast_to(1 + weight.astype(jnp.float32), y.shape) * y).astype(x.dtype)
    return jnp.broadcast_to(weight.astype(x.dtype), x.shape) * y.astype(x.dtype)


class LayerNorm(nn.Module):
  """Layer normalisation in float32."""

  epsilon: float

  @nn.compact
  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    weight = self.param("weight", nn.initializers.ones, (x.shape[-1],)).astype(jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],)).astype(jnp.float32)
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
    return (jnp.broadcast_to(weight, y.shape) * y + jnp.broadcast_to(bias, y.shape)).astype(x.dtype)


NORMS = {"layer_norm": LayerNorm, "rms_norm": RMSNorm}
