"""FitPrune: a few tokens at every layer, by a table that was fitted to attention statistics."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from himap_jax.method import Method, View, highest
from himap_jax.scoring import attention_of_rows, queries_of

# Tokens that the authors drop after each layer of LLaVA-1.5-7B (32 layers, 576 image tokens) to save 60% of its FLOPs.
DROPPED = (
  *(14, 33, 89, 36, 36, 20, 55, 21, 18, 4, 7, 5, 2, 5, 7, 4),
  *(26, 5, 11, 24, 4, 18, 2, 1, 0, 0, 1, 0, 1, 0, 0, 0),
)
NUM_IMAGE_TOKENS = 576


def kept_shares(num_layers: int) -> np.ndarray:
  """The share of image tokens that enters each layer; other depths than the table's read it at the same relative depth."""
  entering = 1 - np.concatenate([[0], np.cumsum(DROPPED)]) / NUM_IMAGE_TOKENS
  depth = np.arange(num_layers) * (len(DROPPED) / num_layers)
  return np.interp(depth, np.arange(len(entering)), entering)


def prune_layers(num_layers: int) -> tuple[int, ...]:
  """The layers that fewer tokens enter than the layer before."""
  return tuple((np.flatnonzero(np.diff(kept_shares(num_layers)) < 0) + 1).tolist())


def keep(num_layers: int) -> tuple[float, ...]:
  """The share of the image's tokens that enters each of `prune_layers`."""
  return tuple(kept_shares(num_layers)[list(prune_layers(num_layers))].tolist())


def attention_product(view: View) -> Float[Array, "B M"]:
  """Attention received from the image × attention received from the text after it, each the largest over heads."""
  slots, valid = view.layout.instruction_slots(view.x.shape[1])
  image_slots = view.layout.image_slots()

  def received(rows, weight):
    query = queries_of(view.projections, rows)
    largest = attention_of_rows(query, view.projections.key, rows).max(axis=(1, 2))
    return jnp.take_along_axis(jnp.einsum("BQS,BQ->BS", largest, weight), image_slots, axis=1)

  from_image = received(image_slots, jnp.full(image_slots.shape, 1.0 / image_slots.shape[1], jnp.float32))
  return from_image * received(slots, valid.astype(jnp.float32))


METHOD = Method(
  source="arXiv 2409.10197, 60% fewer FLOPs",
  criteria=(highest(attention_product, lambda sizes: sizes.attention(sizes.num_slots)),),
  prune_layers=prune_layers,
  keep=keep,
)
