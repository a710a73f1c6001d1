"""Saliency of attention: how much every pair of tokens matters to the answer (HiMAP, Eq. 1).

Axes: L layers, B batch, S slots, N image tokens, V vocabulary, P blocks.

I = |Σ over heads of A ⊙ ∂L/∂A|, with L the cross-entropy of the answer's first token. Each probability is multiplied by one; the
gradient by these ones, shared by all heads, is the sum.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from experiments.flow import tokens
from experiments.flow.decoder import first_logits, weigh
from himap_jax.layout import Layout, take_slots
from himap_jax.llava import Inputs, Llava
from himap_jax.prefill import Embedded


class Flow(NamedTuple):
  """What the saliency of some layers amounts to.

  Attributes:
    sums: `[L, B, P]` of the blocks in `tokens.BLOCKS`.
    pairs: `[B, P]` pairs of tokens in each.
    contributions: `[L, B, 3]` what flows into the last token from each of `tokens.KINDS`, summed.
    num_tokens: `[B, 3]` tokens of each kind.
    to_instruction: `[L, B, N]` what flows from every image token into the instruction.
    to_image: `[L, B, N]` what flows from it into the image.
  """

  sums: Float[Array, "L B P"]
  pairs: Int[Array, "B P"]
  contributions: Float[Array, "L B 3"]
  num_tokens: Int[Array, "B 3"]
  to_instruction: Float[Array, "L B N"]
  to_image: Float[Array, "L B N"]


def saliency(
  model: Llava, params: Any, embedded: Embedded, answers: Int[Array, "B"], layers: tuple[int, ...]
) -> Float[Array, "L B S S"]:
  """The saliency of every pair (query, key) in some layers.

  Args:
    model: the model.
    params: its parameters.
    embedded: the prompts, from `Llava.embed`.
    answers: the first token of each answer.
    layers: which; memory grows with their number; static.
  """
  batch, slots = embedded[0].shape[:2]

  def loss(ones: Float[Array, "L B S S"]) -> Float[Array, ""]:
    edits = {
      layer: lambda probabilities, values, one=one: weigh(probabilities * one[:, None], values)
      for layer, one in zip(layers, ones, strict=True)
    }
    logits = first_logits(model, params, embedded, edits)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), answers[:, None], axis=1).sum()

  return jnp.abs(jax.grad(loss)(jnp.ones((len(layers), batch, slots, slots), jnp.float32)))


def flow(values: Float[Array, "L B S S"], layout: Layout) -> Flow:
  """Sums up the saliency of pairs."""
  slots = values.shape[-1]
  masks = jnp.stack([tokens.block(layout, slots, name) for name in tokens.BLOCKS], axis=1)
  kinds = jnp.stack(list(tokens.kinds(layout, slots).values()), axis=1)
  last = take_slots(jnp.moveaxis(values, 0, 2), (layout.length - 1)[:, None])[:, 0]  # [B, L, S]

  def from_image_tokens(block: str) -> Float[Array, "L B N"]:
    received = jnp.where(tokens.block(layout, slots, block)[None], values, 0).sum(axis=2)
    return jax.vmap(lambda layer: take_slots(layer, layout.image_slots()))(received)

  return Flow(
    sums=jnp.einsum("LBST,BPST->LBP", values, masks.astype(values.dtype)),
    pairs=masks.sum(axis=(2, 3)),
    contributions=jnp.einsum("BLS,BCS->LBC", last, kinds.astype(values.dtype)),
    num_tokens=kinds.sum(axis=2),
    to_instruction=from_image_tokens("image→instruction"),
    to_image=from_image_tokens("image→image"),
  )


@functools.partial(jax.jit, static_argnames=("model", "layers"))
def flow_of(
  model: Llava, params: Any, inputs: Inputs, answers: Int[Array, "B"] | None, *, layers: tuple[int, ...]
) -> tuple[Flow, Int[Array, "B"]]:
  """The flow in some layers, and the first token of the answers; the model's own where none are given."""
  embedded = jax.lax.stop_gradient(model.bind({"params": params}).embed(inputs))
  if answers is None:
    answers = first_logits(model, params, embedded, {}).argmax(axis=-1)
  return flow(saliency(model, params, embedded, answers, layers), embedded[1]), answers
