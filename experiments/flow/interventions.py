"""Interventions on attention: which pairs are removed, and what replaces them (HiMAP, section 3.2).

A token's attention to itself always stays, since it moves no information between tokens. With cross-attention, only
cross layers are disrupted, and a token from which all image tokens are hidden receives nothing.

Axes: L layers, B batch, S slots, Q query slots, T key slots, A aligned tokens, N query heads, H head dim, D model dim, V
vocabulary.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt, UInt32

from experiments.flow import tokens
from experiments.flow.decoder import attended, edited, run_layer, weigh
from himap_jax.engine import prefill
from himap_jax.inputs import TEXT, Inputs, Layout, take_slots
from himap_jax.model.cross_attention import CrossLayout
from himap_jax.model.network import Embedded, Model

BLOCKS = ("image→instruction", "image→image")
HOW = {
  "mask": "hidden before the softmax, so that other pairs take their probability (the authors' code)",
  "zero": "probabilities set to zero (the paper's text)",
  "mean": "the context from these pairs replaced by its mean over the other questions at the same position",
}
CHOSEN = {
  "block": "the block's pairs",
  "random": "as many random pairs",
  "mass": "random pairs with the block's total probability in that layer",
  "rows": "the image's pairs with as many random tokens after the system prompt (the authors' image→random), or with as "
  "many random text tokens where these alone read the image",
}
IN_TABLES = {"block": "", "random": "as many as ", "mass": "as much as ", "rows": "image→random for "}


@dataclasses.dataclass(frozen=True)
class Intervention:
  """A disruption of attention: one of `BLOCKS`, a key of `CHOSEN` and one of `HOW`."""

  block: str
  chosen: str
  how: str

  @property
  def name(self) -> str:
    return f"{IN_TABLES[self.chosen]}{self.block}, {self.how}"

  @property
  def is_defined(self) -> bool:
    """Whether it exists: only whole blocks have means, and only the instruction has as many tokens elsewhere."""
    return self.chosen == "block" or (self.how != "mean" and (self.chosen != "rows" or self.block == BLOCKS[0]))


class Undisturbed(NamedTuple):
  """A prefill without intervention: prompts, the input of every layer, and the first answer token's logits."""

  embedded: Embedded
  hidden: Float[Array, "L B S D"]
  logits: Float[Array, "B V"]


@jax.jit
def undisturbed(model: Model, inputs: Inputs) -> Undisturbed:
  embedded = model.bind().embed(inputs)
  sequence, states = prefill.start(embedded), [embedded.x]
  for layer in range(model.config.text.num_hidden_layers):
    states.append(run_layer(model, layer, states[-1], sequence)[0])
  logits = prefill.last_logits(model.bind(), sequence._replace(x=states.pop()))
  return Undisturbed(embedded, jnp.stack(states), logits)


def aligned(layout: Layout) -> tuple[Int[Array, "B A"], Bool[Array, "B A"]]:
  """Slots that receive information, and which exist: image tokens, then the instruction from its end backwards.

  Image tokens that are read by cross-attention receive none and are left out.
  """
  places = jnp.arange(layout.num_slots - layout.num_image_tokens, dtype=jnp.int32)[None]
  instruction = jnp.maximum(layout.last_slot()[:, None] - places, 0)
  present = places < tokens.kinds(layout)["instruction"].sum(axis=1, keepdims=True)
  if isinstance(layout, CrossLayout):
    return instruction, present
  parts = (layout.image_slots(), instruction), (layout.image_present(), present)
  return tuple(jnp.concatenate(part, axis=1) for part in parts)


@jax.jit
def flows(model: Model, plain: Undisturbed) -> tuple[Float[Array, "L B A N H"], Bool[Array, "B A"]]:
  """The context that each aligned token receives from other image tokens, 0 without any, and which tokens exist."""
  layout = plain.embedded.layout
  text, (slots, present), received = model.config.text, aligned(layout), []
  places = attended(model, layout, tokens.layers_of(text, BLOCKS[0])[0])
  pairs = places.pairs(tokens.block(layout, BLOCKS[0]) | tokens.block(layout, BLOCKS[1]))[:, None]
  attention = edited(model, lambda a, v: weigh(jnp.where(pairs, a, 0), v)).network.kernels.attention
  for layer, x in enumerate(plain.hidden):
    if layer not in tokens.layers_of(text, BLOCKS[0]):
      received.append(jnp.zeros((*slots.shape, text.num_attention_heads, text.head_dim), jnp.float32))
      continue
    _, p = run_layer(model, layer, x, prefill.start(plain.embedded))
    seen = places.at_keys(layout.replace(window=text.window(layer)).visible(places.queries))[:, None]
    context = attention(p.query, p.key, p.value, seen).astype(jnp.float32)
    context = take_slots(places.at_slots(context, layout.num_slots), slots)
    received.append(jnp.where(present[:, :, None, None], context, 0))
  return jnp.stack(received), present


@functools.partial(jax.jit, static_argnames="intervention")
def disrupted_logits(
  model: Model,
  plain: Undisturbed,
  intervention: Intervention,
  active: Bool[Array, "L"],
  means: Float[Array, "L B A N H"] | None,
  seeds: UInt[Array, "B"],
) -> Float[Array, "B V"]:
  """Logits of the first answer token with the active layers, at least one, disrupted where their attention has the block.

  The hidden states before the first active layer are taken from `plain`. `means` are means of `flows` over other
  questions, needed where `how` is `mean`; `seeds` seed the random draws of each row.
  """
  keys = jax.vmap(jax.random.key)(seeds)
  sequence, layout = prefill.start(plain.embedded), plain.embedded.layout
  block, every = tokens.block(layout, intervention.block), tokens.visible(layout)
  chance = jax.vmap(lambda key: jax.random.bits(key, (layout.num_slots, layout.num_slots)))(keys)
  layers = tokens.layers_of(model.config.text, intervention.block)
  places = attended(model, layout, layers[0])  # the same in all of them
  block, every, chance = map(places.pairs, (block, every, chance))
  pairs = block
  if intervention.chosen == "rows":
    pairs = places.pairs(_into_random_tokens(layout, keys))
  elif intervention.chosen == "random":
    pairs = _as_much(chance, every.astype(jnp.float32), block)
  slots, present = aligned(layout)
  receives = present & take_slots(tokens.kinds(layout)[tokens.BLOCKS[intervention.block][0]], slots)

  def edit(layer: int, probabilities: Float[Array, "B N Q T"], values: Float[Array, "B T N H"]) -> Array:
    taken = pairs
    if intervention.chosen == "mass":
      taken = _as_much(chance, jnp.where(every, probabilities.mean(axis=1), 0), block)
    left = jnp.where(taken[:, None], 0, probabilities)
    if intervention.how == "mask":
      left = left / jnp.maximum(left.sum(axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    context = weigh(left, values)
    if intervention.how == "mean":
      added = jnp.where(receives[:, :, None, None], means[layer], 0).astype(context.dtype)
      by_slot = jnp.zeros((len(added), layout.num_slots, *added.shape[2:]), added.dtype)
      by_slot = jax.vmap(lambda one, at, new: one.at[at].add(new))(by_slot, slots, added)
      context += places.at_queries(by_slot)
    return context

  x, first = sequence.x, active.argmax()
  for layer in range(model.config.text.num_hidden_layers):
    x = jnp.where(layer <= first, plain.hidden[layer], x)
    which = (layer >= first).astype(jnp.int32) + active[layer].astype(jnp.int32)
    models = (model, edited(model, functools.partial(edit, layer))) if layer in layers else (model,)
    runs = [lambda x, own=own, layer=layer: run_layer(own, layer, x, sequence)[0] for own in models]
    x = jax.lax.switch(which, [lambda x: x, *runs], x)  # clamps `which` where there is nothing to disrupt
  return prefill.last_logits(model.bind(), sequence._replace(x=x))


def _into_random_tokens(layout: Layout, keys: Key[Array, "B"]) -> Bool[Array, "B S S"]:
  """The image's pairs with as many random tokens that `CHOSEN` names as the instruction has."""
  kinds = tokens.kinds(layout)
  chance = jax.vmap(lambda key: jax.random.uniform(key, (layout.num_slots,)))(keys)
  may = layout.kind == TEXT if isinstance(layout, CrossLayout) else kinds["image"] | kinds["instruction"]
  chance = jnp.where(may, chance, 2)
  rank = jnp.argsort(jnp.argsort(chance, axis=1), axis=1)
  rows = rank < kinds["instruction"].sum(axis=1, keepdims=True)
  return rows[:, :, None] & kinds["image"][:, None] & tokens.visible(layout)


def _as_much(
  chance: UInt32[Array, "B Q T"], weights: Float[Array, "B Q T"], pairs: Bool[Array, "B Q T"]
) -> Bool[Array, "B Q T"]:
  """Random pairs, those of lowest chance, with at most the total weight of the given pairs."""
  target = jnp.where(pairs, weights, 0).sum(axis=(1, 2))

  def step(index: Int[Array, ""], bound: UInt32[Array, "B"]) -> UInt32[Array, "B"]:
    higher = bound | (jnp.uint32(1 << 31) >> index.astype(jnp.uint32))
    total = jnp.where(chance < higher[:, None, None], weights, 0).sum(axis=(1, 2))
    return jnp.where(total <= target, higher, bound)

  bound = jax.lax.fori_loop(0, 32, step, jnp.zeros(len(chance), jnp.uint32))
  return (chance < bound[:, None, None]) & (weights > 0)
