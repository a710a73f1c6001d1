"""Decoding: some steps of one token in every slot, in a single loop on the device.

Axes: B slots, P rows of a prefilled batch, C steps of one call, V vocabulary.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from himap_jax.engine.prefill import PrefillState
from himap_jax.engine.sampling import Kind, choose, row_keys
from himap_jax.engine.slots import Entered, Rows, Slots, put
from himap_jax.inputs import pytree
from himap_jax.model.network import Network

STEPS = 32  # most of one call
STEPS_TOGETHER = 8  # the most of a call on several devices with rows of their own, which all take as many


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
  """Static settings of the programs that choose tokens.

  Attributes:
    max_new_tokens: the most of any row.
    kind: that serves all rows.
    eos_token_ids: end a row.
    num_shards: devices of the mesh axis `data`.
    most_steps: of one call.
  """

  max_new_tokens: int
  kind: Kind = Kind.GREEDY
  eos_token_ids: tuple[int, ...] = ()
  num_shards: int = 1
  most_steps: int = STEPS

  @property
  def num_new(self) -> int:
    """The most tokens after a prompt that are read again."""
    return max(1, self.max_new_tokens - 1)


@pytree
class Decoded:
  """What a call has generated.

  Attributes:
    tokens: `[B, C]` in each slot, 0 after the end of its row.
    num_tokens: `[B]` how many of these.
    active: `[B]` whether the slot's row goes on.
    is_finite: `[B]` whether all logits of the slot's row were in these steps; it ends with the first that are not.
    num_steps: steps taken.
  """

  tokens: Int[Array, "B C"]
  num_tokens: Int[Array, "B"]
  active: Bool[Array, "B"]
  is_finite: Bool[Array, "B"]
  num_steps: Int[Array, ""]


def enter(
  slots: Slots, prompts: PrefillState, rows: Rows, restart: Bool[Array, ""], config: DecodeConfig
) -> tuple[Slots, Entered]:
  """Chooses the first tokens of prefilled rows and puts those that go on into free slots.

  A row whose logits are not finite ends here.

  Args:
    restart: whether no slot is in use, so that the ring of new tokens begins anew.
  """
  before = jnp.zeros_like(prompts.next_order)
  first = choose(config.kind, rows.sampling, prompts.logits, row_keys(rows.seeds)[1], before)
  slots = slots.replace(new=slots.new.replace(num_written=jnp.where(restart, 0, slots.new.num_written)))
  ends = _ended(first, config) | ~_are_finite(prompts.logits)
  return put(slots, prompts, rows, (first, ends), config.num_shards)


def decode(
  network: Network, slots: Slots, stopped: Bool[Array, "B"], num_wanted: Int[Array, ""], config: DecodeConfig
) -> tuple[Slots, Decoded]:
  """Takes steps until enough slots are free, no row is left, or C are taken.

  Devices that have rows of their own take C steps without asking each other.

  Args:
    stopped: rows to end before the first step.
    num_wanted: free slots that are enough.
  """
  keys, is_alone = row_keys(slots.rows.seeds)[1], config.num_shards == 1
  most = min(config.most_steps, config.num_new, STEPS if is_alone else STEPS_TOGETHER)

  def goes_on(state: tuple[Slots, Decoded]) -> Bool[Array, ""]:
    _, decoded = state
    has_steps = decoded.num_steps < most
    if not is_alone:
      return has_steps
    num_free = (~decoded.active).sum(dtype=jnp.int32)
    return has_steps & decoded.active.any() & (num_free < num_wanted)

  def step(state: tuple[Slots, Decoded]) -> tuple[Slots, Decoded]:
    slots, decoded = state
    with jax.named_scope("decode"):
      x, new = network.language_model.extend(
        slots.last[:, None], slots.position[:, None], slots.order, slots.caches, slots.new, network.dtype
      )
      logits = network.logits(x)[:, 0]
      token = choose(config.kind, slots.rows.sampling, logits, keys, slots.num_tokens)
    token = jnp.where(slots.active, token, 0)
    one = slots.active.astype(jnp.int32)
    num_tokens = slots.num_tokens + one
    is_finite = _are_finite(logits) | ~slots.active
    active = slots.active & is_finite & ~_ended(token, config) & (num_tokens < slots.rows.limits)
    tokens = jax.lax.dynamic_update_slice_in_dim(decoded.tokens, token[:, None], decoded.num_steps, axis=1)
    slots = slots.replace(
      new=new,
      last=token,
      position=slots.position + one,
      order=slots.order + one,
      num_tokens=num_tokens,
      active=active,
    )
    is_finite = decoded.is_finite & is_finite
    return slots, Decoded(tokens, decoded.num_tokens + one, active, is_finite, decoded.num_steps + 1)

  active = slots.active & ~stopped
  zeros = jnp.zeros(active.shape, jnp.int32)
  none = Decoded(jnp.zeros((len(active), most), jnp.int32), zeros, active, jnp.ones_like(active), jnp.int32(0))
  return jax.lax.while_loop(goes_on, step, (slots.replace(active=active), none))


def _are_finite(logits: Float[Array, "B V"]) -> Bool[Array, "B"]:
  return jnp.isfinite(logits).all(axis=1)


def _ended(token: Int[Array, "B"], config: DecodeConfig) -> Bool[Array, "B"]:
  matches = [token == eos for eos in config.eos_token_ids]
  return functools.reduce(jnp.logical_or, matches, jnp.zeros_like(token, dtype=bool))
