"""A regular grid of tokens, whatever the picture shows: the control without chance."""

import math

import jax.numpy as jnp
import numpy as np

from himap_jax.method import Criterion, Method, Selection, View


def spread(num_tokens: int, keep: int) -> np.ndarray:
  """`keep` of `num_tokens` indices at equal distances."""
  return ((np.arange(keep) + 0.5) * num_tokens / keep).astype(np.int32)


def grid(side: int, keep: int) -> np.ndarray:
  """`keep` of a square grid's indices: rows at equal distances, and in each row tokens at equal distances."""
  rows = spread(side, min(side, max(math.ceil(keep / side), round(keep**0.5))))
  per_row = np.diff(np.arange(len(rows) + 1) * keep // len(rows))
  return np.concatenate([row * side + spread(side, count) for row, count in zip(rows, per_row, strict=True)])


def regular(view: View, keep: int) -> Selection:
  """The same tokens for every row."""
  num_tokens = view.layout.num_image_tokens
  side = math.isqrt(num_tokens)
  is_whole_grid = side * side == num_tokens == view.tower.features.shape[1]
  kept = grid(side, keep) if is_whole_grid else spread(num_tokens, keep)
  return Selection(jnp.broadcast_to(jnp.asarray(kept, jnp.int32), (view.x.shape[0], keep)))


METHOD = Method(
  source="control", criteria=(Criterion(regular, lambda sizes: 0),), acts="anywhere", prune_layers=(0,), keep=(0.25,)
)
