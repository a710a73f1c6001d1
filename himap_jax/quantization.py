"""Decoder weights of eight bits: half the bytes that a decoded token has to read.

Axes: D in features, F out features.
"""

import jax
import jax.numpy as jnp
import qwix
from jaxtyping import Array, Float, PyTree


@jax.jit
def quantize(weight: Float[Array, "F D"]) -> qwix.QArray:
  """Symmetric int8 with a float32 scale for every output feature."""
  return qwix.quantize(weight.astype(jnp.float32), jnp.int8, channelwise_axes=(0,))


def quantize_decoder(params: PyTree) -> PyTree:
  """Quantises the weights of the decoder's linear layers and of a head of its own, one by one, each original being deleted.

  The tower, the projector, norms, and an embedding table, which may be the head as well, stay as they are.
  """

  def convert(path: tuple[jax.tree_util.DictKey, ...], leaf: Array) -> Array | qwix.QArray:
    names = [entry.key for entry in path]
    is_linear = names[0] == "language_model" and names[-2].endswith("_proj") and names[-1] == "weight"
    if not is_linear and names[0] != "lm_head":
      return leaf
    quantized = jax.block_until_ready(quantize(leaf))
    leaf.delete()
    return quantized

  return jax.tree_util.tree_map_with_path(convert, params)


def mixed_product(x: Float[Array, "B S D"], weight: qwix.QArray) -> Float[Array, "B S F"]:
  """`x · weightᵀ` in float32; the weight's integers are exact in any dtype of `x`, and its scales come after."""
  y = jnp.einsum("BSD,FD->BSF", x, weight.qvalue.astype(x.dtype), preferred_element_type=jnp.float32)
  return y * jnp.broadcast_to(weight.scale[:, 0], y.shape)


def integer_product(x: Float[Array, "B S D"], weight: qwix.QArray) -> Float[Array, "B S F"]:
  """`x · weightᵀ` in float32, a product of integers: the activations become int8 too, with a scale for every slot."""
  x = qwix.quantize(x.astype(jnp.float32), jnp.int8, channelwise_axes=(0, 1))
  with jax.numpy_dtype_promotion("standard"):  # qwix mixes dtypes inside
    y = qwix.dot_general(weight, x, (((1,), (2,)), ((), ())), preferred_element_type=jnp.float32)
  # Of few rows XLA on CPU computes `weight · xᵀ` twice as fast as its transpose, which it would make of the two.
  return jnp.moveaxis(jax.lax.optimization_barrier(y), 0, -1)
