"""The library's decoder with what is done to attention between probabilities and values, layer by layer.

Axes: B batch, S query slots, T key slots, N query heads, K key heads, H head dim, D model dim, V vocabulary.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from himap_jax import prefill
from himap_jax.llava import Llava
from himap_jax.prefill import Embedded

# (probabilities, values of every query head) to the context of every query, `[B, S, N, H]`.
Edit = Callable[[Float[Array, "B N S T"], Float[Array, "B T N H"]], Float[Array, "B S N H"]]


def weigh(probabilities: Float[Array, "B N S T"], values: Float[Array, "B T N H"]) -> Float[Array, "B S N H"]:
  """The context that attention gives: the edit that changes nothing."""
  return jnp.einsum(
    "BNST,BTNH->BSNH", probabilities.astype(values.dtype), values, preferred_element_type=jnp.float32
  ).astype(values.dtype)


def edited_attention(
  query: Float[Array, "B S N H"],
  key: Float[Array, "B T K H"],
  value: Float[Array, "B T K H"],
  mask: Bool[Array, "B 1 S T"] | None = None,
  *,
  is_causal: bool = False,
  edit: Edit,
) -> Float[Array, "B S N H"]:
  """Attention whose probabilities are all there, in float32, and edited."""
  group = query.shape[2] // key.shape[2]
  key, value = (jnp.repeat(x, group, axis=2) for x in (key, value))
  logits = jnp.einsum("BSNH,BTNH->BNST", query, key, preferred_element_type=jnp.float32) * query.shape[-1] ** -0.5
  slots, seen = logits.shape[2:]
  visible = jnp.ones((1, 1, slots, seen), bool) if mask is None else mask
  if is_causal:
    visible &= jnp.tril(jnp.ones((slots, seen), bool))[None, None]
  return edit(jax.nn.softmax(jnp.where(visible, logits, jnp.finfo(jnp.float32).min), axis=-1), value)


def first_logits(model: Llava, params: Any, embedded: Embedded, edits: Mapping[int, Edit]) -> Float[Array, "B V"]:
  """The logits of the first answer token, without pruning, where some layers' attention is edited.

  Args:
    model: the model.
    params: its parameters.
    embedded: the prompts, from `Llava.embed`.
    edits: by layer; the others attend as the model does.
  """
  sequence = prefill.start(embedded)

  def run(layer: int, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    own = model.clone(attend=functools.partial(edited_attention, edit=edits[layer])) if layer in edits else model
    x, _ = own.bind({"params": params}).language_model(x, sequence.positions, first=layer, last=layer + 1)
    return x

  x = sequence.x
  for layer in range(model.config.text.num_hidden_layers):
    x = jax.checkpoint(functools.partial(run, layer))(x)  # gradients keep one layer's attention at a time
  return prefill.last_logits(model.bind({"params": params}), sequence._replace(x=x))
