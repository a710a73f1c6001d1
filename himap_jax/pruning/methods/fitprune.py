"""FitPrune: a few tokens at almost every layer, by a table fitted to attention statistics."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from himap_jax.pruning.method import SEQUENCE, Method, View, highest
from himap_jax.pruning.scoring import sum_over_rows

# Tokens that the authors drop after each layer of LLaVA-1.5-7B (32 layers, 576 image tokens) to save 60% of its FLOPs.
DROPPED = (14, 33, 89, 36, 36, 20, 55, 21, 18, 4, 7, 5, 2, 5, 7, 4, 26, 5, 11, 24, 4, 18, 2, 1, 0, 0, 1, 0, 1, 0, 0, 0)
NUM_IMAGE_TOKENS = 576


def kept_shares(num_layers: int) -> np.ndarray:
  """Share of image tokens that enters each layer; at another depth the table is read at the same relative depth."""
  entering = 1 - np.concatenate([[0], np.cumsum(DROPPED)]) / NUM_IMAGE_TOKENS
  depth = np.arange(num_layers) * (len(DROPPED) / num_layers)
  return np.interp(depth, np.arange(len(entering)), entering)


def prune_layers(num_layers: int) -> tuple[int, ...]:
  """Layers that fewer tokens enter than the layer before."""
  return tuple((np.flatnonzero(np.diff(kept_shares(num_layers)) < 0) + 1).tolist())


def keep(num_layers: int) -> tuple[float, ...]:
  """Share of the image's tokens that enters each of `prune_layers`."""
  return tuple(kept_shares(num_layers)[list(prune_layers(num_layers))].tolist())


def highest_by_slots(*arguments: Any) -> Float[Array, "B S"]:
  """As `scoring.received_by_slots`, but with the maximum over heads."""
  return sum_over_rows(lambda attention: attention.max(axis=(1, 2)).sum(axis=1), *arguments)


def attention_product(view: View) -> Float[Array, "B M"]:
  """Attention received from the image × attention received from the text after it, each the maximum over heads."""
  view = dataclasses.replace(view, received=highest_by_slots)
  from_image = view.attention_from(view.layout.image_slots(), view.layout.image_present())
  return from_image / from_image.shape[1] * view.attention_from(*view.layout.instruction_slots())


CRITERION = highest(attention_product, lambda sizes: sizes.attention(sizes.num_slots))
METHODS = {"fitprune": Method("arXiv 2409.10197, 60% fewer FLOPs", (CRITERION,), prune_layers, keep, needs=SEQUENCE)}
