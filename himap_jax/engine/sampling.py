"""The choice of the next token.

Axes: B rows, V vocabulary.
"""

import dataclasses
import enum
import numbers
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt

from himap_jax.errors import UserError, check_is
from himap_jax.inputs import pytree

MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e6


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Choice of tokens.

  Attributes:
    temperature: 0 is greedy; otherwise from `MIN_TEMPERATURE` to `MAX_TEMPERATURE`.
    top_p: probability of the smallest set of tokens to sample from (Holtzman et al., arXiv 1904.09751).
  """

  temperature: float = 0.0
  top_p: float = 1.0

  def __post_init__(self) -> None:
    for name in ("temperature", "top_p"):
      check_is(name, getattr(self, name), numbers.Real, "a number")
    if self.temperature != 0 and not MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE:
      raise UserError(
        f"the temperature must be 0, or from {MIN_TEMPERATURE} to {MAX_TEMPERATURE:,.0f}, but is {self.temperature}"
      )
    if not 0 < self.top_p <= 1:
      raise UserError(f"top_p must be above 0 and at most 1, but is {self.top_p}")
    if self.temperature == 0 and self.top_p < 1:
      raise UserError("top_p below 1 needs a temperature above 0: temperature 0 always takes the likeliest token")


@pytree
class RowSampling:
  """`Sampling` of every row: `[B]` float32 each."""

  temperature: Float[Array, "B"]
  top_p: Float[Array, "B"]

  @classmethod
  def of(cls, rows: Sequence[Sampling]) -> "RowSampling":
    """On the host."""
    return cls(*(np.array([getattr(row, name) for row in rows], np.float32) for name in ("temperature", "top_p")))


class Kind(enum.IntEnum):
  """What choosing tokens takes: each kind serves rows of those before it, too."""

  GREEDY = 0
  SAMPLED = 1
  NUCLEUS = 2

  @classmethod
  def of(cls, sampling: Sampling) -> "Kind":
    if sampling.temperature == 0:
      return cls.GREEDY
    return cls.SAMPLED if sampling.top_p == 1 else cls.NUCLEUS


def row_keys(seeds: UInt[Array, "B"]) -> tuple[Key[Array, "B"], Key[Array, "B"]]:
  """Random keys of each row, for its method and for sampling."""
  both = jax.vmap(jax.random.split)(jax.vmap(jax.random.key)(seeds))
  return both[:, 0], both[:, 1]


def choose(
  kind: Kind, sampling: RowSampling, logits: Float[Array, "B V"], keys: Key[Array, "B"], steps: Int[Array, "B"]
) -> Int[Array, "B"]:
  """Chooses a token per row, which depends only on the row's sampling, key, step and logits; `kind` serves all rows."""
  likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  if kind == Kind.GREEDY:
    return likeliest
  keys = jax.vmap(jax.random.fold_in)(keys, steps)
  is_greedy = sampling.temperature == 0
  logits = logits / jnp.where(is_greedy, 1, sampling.temperature)[:, None]
  if kind == Kind.NUCLEUS:
    logits = truncate(logits, sampling.top_p)
  return jnp.where(is_greedy, likeliest, jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32))


def truncate(logits: Float[Array, "B V"], top_p: Float[Array, "B"]) -> Float[Array, "B V"]:
  """Sets to −∞ the logits outside the smallest set of likeliest tokens whose probabilities reach the row's `top_p`.

  The likeliest token stays, even if `top_p` is 0 in float32.
  """
  descending = -jnp.sort(-logits, axis=-1)
  probabilities = jax.nn.softmax(descending, axis=-1)
  inside = jnp.cumsum(probabilities, axis=-1) - probabilities < top_p[:, None]
  threshold = jnp.min(jnp.where(inside, descending, descending[:, :1]), axis=-1, keepdims=True)
  return jnp.where((logits < threshold) & (top_p < 1)[:, None], -jnp.inf, logits)
