"""What a platform computes in its own way; one module a platform, `xla` for any."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Kernels:
  """The implementations that the model is built with.

  Attributes:
    attention: `(query [B,S,N,H], key [B,T,K,H], value [B,T,K,H], mask [B,1,S,T] or None, is_causal=)` to the context
      `[B,S,N,H]`. K divides N; the softmax is in float32; `is_causal` hides the keys after a query's own slot.
    cache_attention: attention of one new token a row to its prompt and to the tokens after it; as
      `xla.cache_attention`.
    product: `(x [B,S,D], weight [F,D])` to `x · weightᵀ` `[B,S,F]` in float32, the weight int8 or not.
    take_rows: `(table [V,D], ids)` to the rows of a table.
    new_token_dtype: the dtype in which keys and values of new tokens are kept, from that of the activations.
    int8_compiler_options: what XLA is told about programs with int8 weights.
  """

  attention: Callable[..., jax.Array]
  cache_attention: Callable[..., jax.Array]
  product: Callable[[jax.Array, Any], jax.Array]
  take_rows: Callable[[jax.Array, jax.Array], jax.Array]
  new_token_dtype: Callable[[Any], jnp.dtype]
  int8_compiler_options: tuple[tuple[str, str], ...] = ()


def is_quantized(weight: Any) -> bool:
  """Whether a weight is a `qwix.QArray`: int8 values with a scale for every output feature."""
  return hasattr(weight, "qvalue")
