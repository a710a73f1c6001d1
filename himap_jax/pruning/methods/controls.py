"""Controls: no pruning; random tokens, which a method should beat; a regular grid, independent of the picture."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from himap_jax.pruning.method import Criterion, Method, Selection, View, filled, highest


def noise(view: View) -> Float[Array, "B M"]:
  """Independent uniform numbers, which depend only on the row's key and the layer."""
  num_tokens = view.layout.num_image_tokens
  return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, view.layer), (num_tokens,)))(view.keys)


def spread(num_tokens: int, keep: int) -> Int[np.ndarray, "K"]:
  """`keep` equally spaced indices of `num_tokens`."""
  return (2 * np.arange(keep, dtype=np.int32) + 1) * num_tokens // (2 * keep)


def grid(side: int, keep: int) -> Int[np.ndarray, "K"]:
  """`keep` indices of a square grid: equally spaced rows, and equally spaced tokens in each."""
  rows = spread(side, min(side, max(math.ceil(keep / side), round(keep**0.5))))
  per_row = np.diff(np.arange(len(rows) + 1) * keep // len(rows))
  return np.concatenate([row * side + spread(side, count) for row, count in zip(rows, per_row.tolist(), strict=True)])


def regular(view: View, keep: int) -> Selection:
  """A grid of a row whose image tokens are one square grid; equally spaced tokens of any other row."""
  present = view.layout.image_present()
  count, num_tokens = present.sum(axis=1, keepdims=True, dtype=jnp.int32), present.shape[1]
  kept = (2 * jnp.arange(keep, dtype=jnp.int32)[None] + 1) * count // (2 * keep)
  side = math.isqrt(num_tokens)
  if view.grid is not None and side * side == num_tokens == view.grid.shape[1]:
    token = np.arange(num_tokens, dtype=np.int32)
    square = np.stack([np.zeros_like(token), *np.divmod(token, side)], axis=1)[None]
    is_square = (view.grid == square).all(axis=(1, 2)) & present.all(axis=1)
    kept = jnp.where(is_square[:, None], jnp.asarray(grid(side, keep), jnp.int32)[None], kept)
  return Selection(filled(kept, present))


def _control(criterion: Criterion, *, uses_chance: bool) -> Method:
  return Method("control", (criterion,), prune_layers=(0,), keep=(0.25,), acts="anywhere", uses_chance=uses_chance)


METHODS = {
  "none": Method("no pruning"),
  "random": _control(highest(noise, lambda sizes: 0), uses_chance=True),
  "uniform": _control(Criterion(regular, lambda sizes: 0), uses_chance=False),
}
