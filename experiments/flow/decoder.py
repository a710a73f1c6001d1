"""The library's decoder layer by layer, with edited attention or with the scores of HiMAP's stages.

Axes: L layers, B batch, S slots or query slots, T key slots, I image tokens, N query heads, K key heads, H head dim, D
model dim, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from himap_jax.engine import prefill
from himap_jax.inputs import Inputs, Layout, put_slots, take_slots
from himap_jax.model.decoder import Projections
from himap_jax.model.network import Embedded, Model
from himap_jax.pruning.methods.himap import image_attention, instruction_attention

# Maps probabilities and the values of every query head to the context of every query.
Edit = Callable[[Float[Array, "B N S T"], Float[Array, "B T N H"]], Float[Array, "B S N H"]]


class Attended(NamedTuple):
  """The slots between which a layer's attention carries information; None for all slots in their order.

  Attributes:
    queries: of tokens that receive.
    keys: of tokens that are read; past the last slot where a row has fewer.
  """

  queries: Int[Array, "B Q"] | None = None
  keys: Int[Array, "B T"] | None = None

  def pairs(self, values: Shaped[Array, "B S S"]) -> Shaped[Array, "B Q T"]:
    """What belongs to each pair (query, key) of the attention, from what belongs to all pairs of slots."""
    return self.at_keys(self.at_queries(values))

  def at_keys(self, values: Shaped[Array, "B Q S"]) -> Shaped[Array, "B Q T"]:
    if self.keys is None:
      return values
    return jnp.take_along_axis(values, self.keys[:, None], axis=2, mode="fill", fill_value=0)

  def at_queries(self, values: Shaped[Array, "B S *D"]) -> Shaped[Array, "B Q *D"]:
    return values if self.queries is None else take_slots(values, self.queries)

  def at_slots(self, values: Shaped[Array, "B Q *D"], num_slots: int) -> Shaped[Array, "B S *D"]:
    """What belongs to each slot, from what belongs to the queries; zero elsewhere."""
    if self.queries is None:
      return values
    zeros = jnp.zeros((len(values), num_slots, *values.shape[2:]), values.dtype)
    return put_slots(zeros, self.queries, values)


def attended(model: Model, layout: Layout, layer: int) -> Attended:
  """All slots to all; with cross-attention, the text to the text in self layers and to image tokens in cross layers."""
  cross = model.config.text.cross_attention_layers
  if not cross:
    return Attended()
  text = layout.text_slots()
  image = jnp.where(layout.image_present(), layout.image_slots(), layout.num_slots)
  return Attended(text, image if layer in cross else text)


def weigh(probabilities: Float[Array, "B N S T"], values: Float[Array, "B T N H"]) -> Float[Array, "B S N H"]:
  """Unedited attention: the probability-weighted sum of the values."""
  return jnp.einsum(
    "BNST,BTNH->BSNH", probabilities.astype(values.dtype), values, preferred_element_type=jnp.float32
  ).astype(values.dtype)


def edited(model: Model, edit: Edit) -> Model:
  """A model whose attention computes all probabilities in float32 and edits them."""

  def attention(query: Array, key: Array, value: Array, mask: Array | None = None, *, is_causal: bool = False) -> Array:
    key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    logits = jnp.einsum("BSNH,BTNH->BNST", query, key, preferred_element_type=jnp.float32) * query.shape[-1] ** -0.5
    visible = jnp.ones(logits.shape[2:], bool)[None, None]
    visible = jnp.tril(visible) if is_causal else visible
    visible = visible if mask is None else visible & mask
    return edit(jax.nn.softmax(jnp.where(visible, logits, jnp.finfo(jnp.float32).min), axis=-1), value)

  kernels = dataclasses.replace(model.network.kernels, attention=attention)
  return model.replace(network=model.network.clone(kernels=kernels))


def run_layer(
  model: Model, layer: int, x: Float[Array, "B S D"], sequence: prefill.Sequence
) -> tuple[Float[Array, "B S D"], Projections]:
  """The hidden states after one decoder layer, and the layer's projections; `sequence` has positions and layout."""
  layers = range(layer, layer + 1)
  x, (projections,) = model.bind().language_model(x, sequence.positions, layers, layout=sequence.layout)
  return x, projections


def first_logits(model: Model, embedded: Embedded, edits: Mapping[int, Edit]) -> Float[Array, "B V"]:
  """Logits of the first answer token without pruning, with attention edited in some layers."""
  sequence = prefill.start(embedded)
  x = sequence.x
  for layer in range(model.config.text.num_hidden_layers):
    own = edited(model, edits[layer]) if layer in edits else model
    run = jax.checkpoint(functools.partial(run_layer, own, layer))  # gradients keep one layer's attention at a time
    x, _ = run(x, sequence)
  return prefill.last_logits(model.bind(), sequence._replace(x=x))


@functools.partial(jax.jit, static_argnames="num_layers")
def himap_scores(
  model: Model, inputs: Inputs, *, num_layers: int
) -> tuple[Float[Array, "L B I"], Float[Array, "L B I"]]:
  """Scores of HiMAP's two stages after each of the first `num_layers` layers, without pruning."""
  network, scores = model.bind(), []
  sequence = prefill.start(network.embed(inputs))
  context = prefill.Context(jax.random.split(jax.random.key(0), len(inputs.tokens)))
  for layer in range(num_layers):
    x, projections = run_layer(model, layer, sequence.x, sequence)
    sequence = sequence._replace(x=x)
    view = prefill.view(network, layer + 1, sequence, projections, context)
    scores.append((instruction_attention(view), image_attention(view)))
  return tuple(map(jnp.stack, zip(*scores, strict=True)))
