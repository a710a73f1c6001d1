"""The choice of the next token.

Axes: B rows, V vocabulary.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from himap_jax.errors import UserError

MIN_TEMPERATURE = 1e-6


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Choice of tokens.

  Attributes:
    temperature: 0 is greedy; otherwise finite and at least `MIN_TEMPERATURE`.
    top_p: probability of the smallest set of tokens to sample from (Holtzman et al., arXiv 1904.09751).
  """

  temperature: float = 0.0
  top_p: float = 1.0

  def __post_init__(self) -> None:
    if self.temperature != 0 and not MIN_TEMPERATURE <= self.temperature < math.inf:
      raise UserError(f"the temperature must be 0, or finite and at least {MIN_TEMPERATURE}, but is {self.temperature}")
    if not 0 < self.top_p <= 1:
      raise UserError(f"top_p must be above 0 and at most 1, but is {self.top_p}")
    if self.temperature == 0 and self.top_p < 1:
      raise UserError("top_p below 1 needs a temperature above 0: temperature 0 always takes the likeliest token")


def choose(
  sampling: Sampling, logits: Float[Array, "B V"], keys: Key[Array, "B"], step: Int[Array, ""]
) -> Int[Array, "B"]:
  """Chooses a token per row, which depends only on the row's key, the step and the row's logits."""
  if sampling.temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
  logits = truncate(logits / sampling.temperature, sampling.top_p)
  return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def truncate(logits: Float[Array, "B V"], top_p: float) -> Float[Array, "B V"]:
  """Sets to −∞ the logits outside the smallest set of likeliest tokens whose probabilities reach `top_p`."""
  if top_p == 1:
    return logits
  descending = -jnp.sort(-logits, axis=-1)
  probabilities = jax.nn.softmax(descending, axis=-1)
  inside = jnp.cumsum(probabilities, axis=-1) - probabilities < top_p
  threshold = jnp.min(jnp.where(inside, descending, jnp.inf), axis=-1, keepdims=True)
  return jnp.where(logits < threshold, -jnp.inf, logits)
