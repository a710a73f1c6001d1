"""What is taken out of attention, and what is put in its place (HiMAP, section 3.2).

Axes: L layers, B batch, S slots, M image tokens, E places counted from a prompt's end, N query heads, H head dim, D model dim,
V vocabulary.

A token's attention to itself is never taken out: nothing flows between tokens there.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from experiments.flow import tokens
from experiments.flow.decoder import edited_attention, weigh
from himap_jax import prefill
from himap_jax.layout import Layout, put_image_tokens, take_slots
from himap_jax.llava import Llava
from himap_jax.prefill import Embedded

BLOCKS = ("image→instruction", "image→image")
HOW = {
  "mask": "hidden before the softmax, so that the rest takes their weight: the authors' code",
  "zero": "probabilities set to zero: the paper's text",
  "mean": "what flows replaced by its mean over the other questions at the same place",
}
CHOSEN = {
  "block": "the block's pairs",
  "random": "as many pairs at random",
  "mass": "pairs at random that together have the block's probability in that layer",
  "rows": "the image's pairs with as many tokens at random, after the system prompt: the authors' image→random",
}


@dataclasses.dataclass(frozen=True)
class Intervention:
  """One way to disrupt.

  Attributes:
    block: one of `BLOCKS`.
    chosen: a key of `CHOSEN`.
    how: a key of `HOW`; the mean is known for whole blocks alone.
  """

  block: str
  chosen: Literal["block", "random", "mass", "rows"]
  how: Literal["mask", "zero", "mean"]

  @property
  def name(self) -> str:
    """In tables."""
    pairs = {"block": "", "random": "as many as ", "mass": "as much as ", "rows": "image→random for "}[self.chosen]
    return f"{pairs}{self.block}, {self.how}"

  @property
  def is_known(self) -> bool:
    """Whether there is such an intervention: whole blocks have means, and the instruction as many tokens elsewhere."""
    if self.how == "mean":
      return self.chosen == "block"
    return self.chosen != "rows" or self.block == BLOCKS[0]


class Flows(NamedTuple):
  """What flows through each block into one token.

  Attributes:
    into_instruction: `[L, B, E, N, H]` from the image, by the place counted from the prompt's end.
    into_image: `[L, B, M, N, H]` from other image tokens, by image token.
  """

  into_instruction: Float[Array, "L B E N H"]
  into_image: Float[Array, "L B M N H"]


def undisturbed(model: Llava, params: Any, embedded: Embedded) -> tuple[Float[Array, "L B S D"], Float[Array, "B V"]]:
  """What enters every layer, and the logits of the first answer token."""
  bound, sequence = model.bind({"params": params}), prefill.start(embedded)
  x, states = sequence.x, []
  for layer in range(model.config.text.num_hidden_layers):
    states.append(x)
    x, _ = bound.language_model(x, sequence.positions, first=layer, last=layer + 1)
  return jnp.stack(states), prefill.last_logits(bound, sequence._replace(x=x))


def flows(model: Llava, params: Any, embedded: Embedded, hidden: Float[Array, "L B S D"]) -> Flows:
  """What flows in each row; nothing at places before its instruction."""
  bound, sequence = model.bind({"params": params}), prefill.start(embedded)
  layout, slots = sequence.layout, hidden.shape[2]
  from_end = _slots_from_end(layout, slots)
  into_instruction, into_image = [], []
  for layer in range(model.config.text.num_hidden_layers):
    _, (p,) = bound.language_model(hidden[layer], sequence.positions, first=layer, last=layer + 1)

    def through(block: str, p: Any = p) -> Float[Array, "B S N H"]:
      pairs = tokens.block(layout, slots, block)[:, None]
      return edited_attention(
        p.query, p.key, p.value, is_causal=True, edit=lambda a, v: weigh(jnp.where(pairs, a, 0), v)
      ).astype(jnp.float32)

    into_instruction.append(take_slots(through(BLOCKS[0]), from_end))
    into_image.append(take_slots(through(BLOCKS[1]), layout.image_slots()))
  return Flows(jnp.stack(into_instruction), jnp.stack(into_image))


def instruction_places(layout: Layout, slots: int) -> Bool[Array, "B E"]:
  """Whether a row has an instruction token at each place counted from the end."""
  places = jnp.arange(slots - layout.num_image_tokens, dtype=jnp.int32)[None]
  return places < _instruction_length(layout)[:, None]


def disrupted_logits(
  model: Llava,
  params: Any,
  embedded: Embedded,
  hidden: Float[Array, "L B S D"],
  active: Bool[Array, "L"],
  intervention: Intervention,
  means: Flows | None,
  keys: Key[Array, "B"],
) -> Float[Array, "B V"]:
  """The logits of the first answer token when some layers are disrupted.

  Args:
    model: the model.
    params: its parameters.
    embedded: the prompts, from `Llava.embed`.
    hidden: from `undisturbed`; the layers before the first active one are not run again.
    active: which layers.
    intervention: static.
    means: what takes the place of what flows, where the mean does.
    keys: a random key a row.
  """
  sequence = prefill.start(embedded)
  layout, slots = sequence.layout, hidden.shape[2]
  pairs = tokens.block(layout, slots, intervention.block)
  if intervention.chosen == "rows":
    pairs = _into_random_tokens(layout, slots, keys)
  elif intervention.chosen in ("random", "mass"):
    every = tokens.all_pairs(layout, slots)
    chance = jax.vmap(lambda key: jax.random.bits(key, (slots, slots)))(keys)
    if intervention.chosen == "random":
      pairs = _as_much(chance, every.astype(jnp.float32), pairs)
  started = jnp.cumsum(active) > 0

  def edit(layer: int, probabilities: Float[Array, "B N S T"], values: Float[Array, "B T N H"]) -> Any:
    taken = pairs
    if intervention.chosen == "mass":
      taken = _as_much(chance, jnp.where(every, probabilities.mean(axis=1), 0), pairs)
    left = jnp.where(taken[:, None], 0, probabilities)
    if intervention.how == "mask":
      left = left / jnp.maximum(left.sum(axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    context = weigh(left, values)
    if intervention.how == "mean":
      context += _place(layout, slots, intervention.block, means, layer).astype(context.dtype)
    return context

  def run(own: Llava, layer: int, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    return own.bind({"params": params}).language_model(x, sequence.positions, first=layer, last=layer + 1)[0]

  x = sequence.x
  for layer in range(model.config.text.num_hidden_layers):

    def attend(*arguments: Any, layer: int = layer, **options: Any) -> Any:
      return edited_attention(*arguments, **options, edit=lambda a, v: edit(layer, a, v))

    def disrupted(x: Array, layer: int = layer, attend: Any = attend) -> Array:
      return run(model.clone(attend=attend), layer, x)

    def plain(x: Array, layer: int = layer) -> Array:
      return run(model, layer, x)

    def step(x: Array, layer: int = layer, disrupted: Any = disrupted, plain: Any = plain) -> Array:
      return jax.lax.cond(active[layer], disrupted, plain, x)

    begins = active[layer] & ~(started[layer - 1] if layer else jnp.bool_(False))
    x = jnp.where(begins, hidden[layer], x)
    x = jax.lax.cond(started[layer], step, lambda x: x, x)
  return prefill.last_logits(model.bind({"params": params}), sequence._replace(x=x))


def _instruction_length(layout: Layout) -> Int[Array, "B"]:
  return layout.length - layout.image_start - layout.num_image_tokens


def _slots_from_end(layout: Layout, slots: int) -> Int[Array, "B E"]:
  """The slot of each place counted from the end."""
  places = jnp.arange(slots - layout.num_image_tokens, dtype=jnp.int32)[None]
  return jnp.maximum(layout.length[:, None] - 1 - places, 0)


def _place(layout: Layout, slots: int, block: str, means: Flows, layer: int) -> Float[Array, "B S N H"]:
  """A block's mean flow in the slots that it flows into, nothing elsewhere."""
  if block == BLOCKS[1]:
    mean = means.into_image[layer]
    flat = mean.reshape(*mean.shape[:2], -1)
    empty = jnp.zeros((len(flat), slots, flat.shape[2]), flat.dtype)
    return put_image_tokens(empty, layout.image_start, flat).reshape(len(flat), slots, *mean.shape[2:])
  mean = means.into_instruction[layer]
  place = layout.length[:, None] - 1 - jnp.arange(slots, dtype=jnp.int32)[None]
  is_instruction = tokens.kinds(layout, slots)["instruction"]
  return jnp.where(is_instruction[:, :, None, None], take_slots(mean, jnp.clip(place, 0, mean.shape[1] - 1)), 0)


def _into_random_tokens(layout: Layout, slots: int, keys: Key[Array, "B"]) -> Bool[Array, "B S S"]:
  """The pairs of the image with as many tokens after the system prompt, drawn at random, as the instruction has."""
  kinds = tokens.kinds(layout, slots)
  chance = jax.vmap(lambda key: jax.random.uniform(key, (slots,)))(keys)
  chance = jnp.where(kinds["image"] | kinds["instruction"], chance, 2)
  place = jnp.argsort(jnp.argsort(chance, axis=1), axis=1)
  rows = place < _instruction_length(layout)[:, None]
  return rows[:, :, None] & kinds["image"][:, None] & tokens.earlier(slots)


def _as_much(
  chance: UInt32[Array, "B S S"], weights: Float[Array, "B S S"], pairs: Bool[Array, "B S S"]
) -> Bool[Array, "B S S"]:
  """The weighed pairs of the lowest chances whose weights add up to those of given pairs, or to less by a part of one."""
  target = jnp.where(pairs, weights, 0).sum(axis=(1, 2))

  def step(index: Int[Array, ""], bound: UInt32[Array, "B"]) -> UInt32[Array, "B"]:
    higher = bound | (jnp.uint32(1 << 31) >> index.astype(jnp.uint32))
    total = jnp.where(chance < higher[:, None, None], weights, 0).sum(axis=(1, 2))
    return jnp.where(total <= target, higher, bound)

  bound = jax.lax.fori_loop(0, 32, step, jnp.zeros(len(chance), jnp.uint32))
  return (chance < bound[:, None, None]) & (weights > 0)
