"""Decoder weights of eight bits: half the bytes that a decoded token has to read.

Axes: D in features, F out features.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import qwix
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree


@jax.jit
def quantize(weight: Float[Array, "F D"]) -> qwix.QArray:
  """Symmetric int8 with a float32 scale for every output feature."""
  return qwix.quantize(weight.astype(jnp.float32), jnp.int8, channelwise_axes=(0,))


def quantize_decoder(params: PyTree) -> PyTree:
  """Quantises the weights of the decoder's linear layers and of a head of its own, one by one, each original being deleted.

  The tower, the projector, norms, and an embedding table, which may be the head as well, stay as they are.
  """

  def convert(leaf: Array) -> qwix.QArray:
    quantized = jax.block_until_ready(quantize(leaf))
    leaf.delete()
    return quantized

  return _map_decoder(convert, params)


def abstract_decoder(params: PyTree) -> PyTree:
  """`quantize_decoder` of `jax.ShapeDtypeStruct`s; where they have shardings, so does the result."""

  def convert(leaf: jax.ShapeDtypeStruct) -> qwix.QArray:
    quantized = jax.eval_shape(quantize, leaf)
    if leaf.sharding is None:
      return quantized
    spec = [*leaf.sharding.spec, None, None]
    scale = NamedSharding(leaf.sharding.mesh, PartitionSpec(spec[0], None))
    return jax.tree.map(lambda x: x.update(sharding=leaf.sharding if x.shape == leaf.shape else scale), quantized)

  return _map_decoder(convert, params)


def _map_decoder(convert: Callable[[Any], qwix.QArray], params: PyTree) -> PyTree:
  def visit(path: tuple[jax.tree_util.DictKey, ...], leaf: Any) -> Any:
    names = [entry.key for entry in path]
    is_linear = names[0] == "language_model" and names[-2].endswith("_proj") and names[-1] == "weight"
    return convert(leaf) if is_linear or names[0] == "lm_head" else leaf

  return jax.tree_util.tree_map_with_path(visit, params)


def mixed_product(x: Float[Array, "B S D"], weight: qwix.QArray) -> Float[Array, "B S F"]:
  """`x · weightᵀ` in float32; the weight's integers are exact in any dtype of `x`, and its scales come after."""
  y = jnp.einsum("BSD,FD->BSF", x, weight.qvalue.astype(x.dtype), preferred_element_type=jnp.float32)
  return y * jnp.broadcast_to(weight.scale[:, 0], y.shape)


def integer_product(x: Float[Array, "B S D"], weight: qwix.QArray) -> Float[Array, "F B S"]:
  """`weight · xᵀ` in float32, a product of integers: the activations become int8 too, with a scale for every slot."""
  x = qwix.quantize(x.astype(jnp.float32), jnp.int8, channelwise_axes=(0, 1))
  with jax.numpy_dtype_promotion("standard"):  # qwix mixes dtypes inside
    return qwix.dot_general(weight, x, (((1,), (2,)), ((), ())), preferred_element_type=jnp.float32)
