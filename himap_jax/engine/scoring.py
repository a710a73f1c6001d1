"""Scores of given continuations, read token by token over prefilled caches.

Axes: B rows, C tokens of a continuation, V vocabulary.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from himap_jax.engine.prefill import PrefillState
from himap_jax.model import cache
from himap_jax.model.cache import NewTokens
from himap_jax.model.network import Network

SLOTS = 8  # continuations are padded to a multiple, which bounds the number of programs


@dataclasses.dataclass(frozen=True)
class Score:
  """A continuation's log-probability, and whether each of its tokens is the likeliest after those before it."""

  log_probability: float
  is_greedy: bool


def pack(continuations: Sequence[Sequence[Sequence[int]]], num_rows: int) -> Iterator[Int[np.ndarray, "B C"]]:
  """Yields the first continuation of every row, then the second, and so on, padded with zeros."""
  for number in range(max(map(len, continuations), default=0)):
    own = [row[number] if number < len(row) else [] for row in continuations]
    tokens = np.zeros((num_rows, -(-max(map(len, own)) // SLOTS) * SLOTS), np.int32)
    for row, given in enumerate(own):
      tokens[row, : len(given)] = given
    yield tokens


def score(
  network: Network, prompts: PrefillState, tokens: Int[Array, "B C"]
) -> tuple[Float[Array, "B C"], Bool[Array, "B C"]]:
  """The log-probability of every token after the prompt and those before it, and whether it is the likeliest."""

  def step(
    carry: tuple[Float[Array, "B V"], NewTokens], token: Int[Array, "B"]
  ) -> tuple[tuple[Float[Array, "B V"], NewTokens], tuple[Float[Array, "B"], Bool[Array, "B"]]]:
    logits, new = carry
    own = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
    scored = own, token == jnp.argmax(logits, axis=-1)
    age = new.num_written
    positions, order = prompts.next_position + age, prompts.next_order + age
    with jax.named_scope("score"):
      x, new = network.language_model.extend(
        token[:, None], positions[:, None], order, prompts.caches, new, network.dtype
      )
      return (network.logits(x)[:, 0], new), scored

  dtype = network.kernels.new_token_dtype(network.dtype)
  new = cache.empty(prompts.caches, tokens.shape[1], dtype)
  _, (log_probabilities, is_likeliest) = jax.lax.scan(step, (prompts.logits, new), tokens.T)
  return log_probabilities.T, is_likeliest.T
