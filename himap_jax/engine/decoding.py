"""Decoding: one token at a time from prefilled caches, in a single loop on the device.

Axes: B rows, M new tokens, V vocabulary.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from himap_jax.engine.prefill import PrefillState
from himap_jax.engine.sampling import Sampling, choose
from himap_jax.inputs import pytree
from himap_jax.model import cache
from himap_jax.model.cache import NewTokens
from himap_jax.model.network import Network


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
  """Static settings of a decode program; `max_new_tokens` is M, and `eos_token_ids` end a row."""

  max_new_tokens: int
  sampling: Sampling = Sampling()
  eos_token_ids: tuple[int, ...] = ()


@pytree
class DecodeState:
  """State of the decode loop.

  Attributes:
    step: tokens generated so far.
    tokens: `[B, M]` generated tokens, 0 after the end of a row.
    last: `[B]` the newest token.
    num_tokens: `[B]` tokens of the row, including the end token.
  """

  step: Int[Array, ""]
  tokens: Int[Array, "B M"]
  last: Int[Array, "B"]
  finished: Bool[Array, "B"]
  num_tokens: Int[Array, "B"]
  new: NewTokens


def decode(
  network: Network, prompts: PrefillState, keys: Key[Array, "B"], config: DecodeConfig
) -> tuple[Int[Array, "B M"], Int[Array, "B"]]:
  """Generates until every row has ended or has `max_new_tokens`; returns the tokens and their number per row."""

  def ended(token: Int[Array, "B"]) -> Bool[Array, "B"]:
    matches = [token == eos for eos in config.eos_token_ids]
    return functools.reduce(jnp.logical_or, matches, jnp.zeros_like(token, dtype=bool))

  def step(state: DecodeState) -> DecodeState:
    age = state.step - 1
    positions, order = prompts.next_position + age, prompts.next_order + age
    with jax.named_scope("decode"):
      x, new = network.language_model.extend(
        state.last[:, None], positions[:, None], order, prompts.caches, state.new, network.dtype
      )
      token = choose(config.sampling, network.logits(x)[:, 0], keys, state.step)
    token = jnp.where(state.finished, 0, token)
    return DecodeState(
      step=state.step + 1,
      tokens=jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.step, axis=1),
      last=token,
      finished=state.finished | ended(token),
      num_tokens=state.num_tokens + (~state.finished).astype(jnp.int32),
      new=new,
    )

  first = choose(config.sampling, prompts.logits, keys, jnp.int32(0))
  tokens = jnp.zeros((first.shape[0], config.max_new_tokens), jnp.int32)
  dtype = network.kernels.new_token_dtype(network.dtype)
  state = DecodeState(
    step=jnp.int32(1),
    tokens=tokens.at[:, 0].set(first),
    last=first,
    finished=ended(first),
    num_tokens=jnp.ones_like(first),
    new=cache.empty(prompts.caches, max(1, config.max_new_tokens - 1), dtype),
  )
  state = jax.lax.while_loop(lambda s: (s.step < config.max_new_tokens) & ~s.finished.all(), step, state)
  return state.tokens, state.num_tokens
