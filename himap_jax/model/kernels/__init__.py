"""Kernels per platform, one module each; `xla` runs on any."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

HIDDEN = -1e30  # logit of a key that a query does not see; within the range of bfloat16


class Devices(NamedTuple):
  """Where kernels in Pallas run: each device runs one on its own rows and heads.

  Attributes:
    spec_of: from the numbers of query and key heads to the sharding of `[B, heads, S, H]`.
    interpret: whether they run in Pallas' interpreter.
  """

  mesh: Mesh
  spec_of: Callable[[int, int], PartitionSpec]
  interpret: bool = False


@dataclasses.dataclass(frozen=True)
class Kernels:
  """Implementations for one platform.

  Attributes:
    attention: `(query [B,S,N,H], key [B,T,K,H], value [B,T,K,H], mask [B,1,S,T] or None, is_causal=, segments=)` to the
      context `[B,S,N,H]`. K divides N; the softmax is in float32; a mask is true where a key is seen, or of floats that
      are added to the logits; `is_causal` hides later keys, and `segments` `[B,S]`, of queries and keys alike, hide those
      of other segments.
    cache_attention: attention of one new token per row; as `xla.cache_attention`.
    product: `(x [B,S,D], weight [F,D])` to `x · weightᵀ` `[B,S,F]` in float32; the weight may be int8.
    weight_gradient: `(g [B,S,F], x [B,S,D])` to `gᵀ · x` `[F,D]` in float32, summed over rows.
    take_rows: `(table [V,D], ids)` to rows of the table.
    new_token_dtype: dtype of new tokens' keys and values, given that of the activations.
    received_attention: from a number of slots to what takes the place of `pruning.scoring.received_by_slots`, which is
      plain JAX; None if that is used.
    int8_compiler_options: XLA options for programs with int8 weights.
    cache_multiple: from the head dim to the multiple to which the slots of a prompt's cache are padded.
    prefill_tokens: tokens of a prefill with which its products take about their full speed.
    most_slots: rows that are decoded together, per device; more do not make a step's rows faster.
  """

  attention: Callable[..., jax.Array]
  cache_attention: Callable[..., jax.Array]
  product: Callable[[jax.Array, Any], jax.Array]
  weight_gradient: Callable[[jax.Array, jax.Array], jax.Array]
  take_rows: Callable[[jax.Array, jax.Array], jax.Array]
  new_token_dtype: Callable[[Any], jnp.dtype]
  received_attention: Callable[[int], Callable[..., jax.Array] | None] = lambda num_slots: None
  int8_compiler_options: tuple[tuple[str, str], ...] = ()
  cache_multiple: Callable[[int], int] = lambda head_dim: 1
  prefill_tokens: int = 2048
  most_slots: int = 4096


def is_quantized(weight: Any) -> bool:
  """Whether a weight is a `qwix.QArray`: int8 values with one scale per output feature."""
  return hasattr(weight, "qvalue")
