"""Decoding: tokens one after the other from prefilled caches, in one loop on the device.

Axes: B rows, M new tokens, V vocabulary.
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from himap_jax import cache
from himap_jax.cache import NewTokens, SegmentCache
from himap_jax.llava import Llava
from himap_jax.sampling import Sampling, choose


@flax.struct.dataclass
class DecodeState:
  """What the decode loop carries.

  Attributes:
    step: scalar, tokens generated so far.
    tokens: `[B, M]` the generated tokens, 0 where there is none.
    last: `[B]` the newest token.
    finished: `[B]` whether the row has ended.
    num_tokens: `[B]` tokens of the row, the one that ended it included.
    new: keys and values of the tokens after the prompts.
  """

  step: Int[Array, ""]
  tokens: Int[Array, "B M"]
  last: Int[Array, "B"]
  finished: Bool[Array, "B"]
  num_tokens: Int[Array, "B"]
  new: NewTokens


def decode(
  model: Llava,
  params: Any,
  logits: Float[Array, "B V"],
  caches: tuple[SegmentCache, ...],
  next_position: Int[Array, "B"],
  keys: Key[Array, "B"],
  *,
  max_new_tokens: int,
  sampling: Sampling,
  eos_token_ids: tuple[int, ...],
) -> tuple[Int[Array, "B M"], Int[Array, "B"]]:
  """Generates from prefilled caches until every row has ended or has `max_new_tokens`.

  Args:
    model: the model.
    params: its parameters.
    logits: of the prompts' last tokens.
    caches: of the prompts.
    next_position: the rotary position of each row's first new token.
    keys: a random key a row.
    max_new_tokens: M; static.
    sampling: how tokens are chosen; static.
    eos_token_ids: tokens that end a row; static.

  Returns:
    The tokens, and how many of each row count.
  """
  bound = model.bind({"params": params})

  def ended(token: Int[Array, "B"]) -> Bool[Array, "B"]:
    return functools.reduce(jnp.logical_or, [token == eos for eos in eos_token_ids], jnp.zeros_like(token, dtype=bool))

  def step(state: DecodeState) -> DecodeState:
    positions = (next_position + state.step - 1)[:, None]
    with jax.named_scope("decode"):
      x, new = bound.language_model.extend(state.last[:, None], positions, caches, state.new, model.dtype)
      token = choose(sampling, bound.logits(x)[:, 0], keys, state.step)
    token = jnp.where(state.finished, 0, token)
    return DecodeState(
      step=state.step + 1,
      tokens=jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.step, axis=1),
      last=token,
      finished=state.finished | ended(token),
      num_tokens=state.num_tokens + (~state.finished).astype(jnp.int32),
      new=new,
    )

  first = choose(sampling, logits, keys, jnp.int32(0))
  tokens = jnp.zeros((first.shape[0], max_new_tokens), jnp.int32)
  state = DecodeState(
    step=jnp.int32(1),
    tokens=tokens.at[:, 0].set(first),
    last=first,
    finished=ended(first),
    num_tokens=jnp.ones_like(first),
    new=cache.empty(caches, max(1, max_new_tokens - 1)),
  )
  state = jax.lax.while_loop(lambda s: (s.step < max_new_tokens) & ~s.finished.all(), step, state)
  return state.tokens, state.num_tokens
