"""Masks of attention on all platforms: of booleans, true where a slot is seen, or of floats, added to the logits.

Axes: B batch, S query slots, T key slots.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from himap_jax.model.kernels import HIDDEN

Mask = Bool[Array, "#B 1 S T"] | Float[Array, "#B 1 S T"]


def in_segments(mask: Mask | None, segments: Int[Array, "B S"] | None) -> Mask | None:
  """A mask that hides slots of other segments, too."""
  return mask if segments is None else where_seen((segments[:, :, None] == segments[:, None])[:, None], mask)


def where_seen(seen: Bool[Array, "#B 1 S T"], mask: Mask | None) -> Mask:
  """A mask that hides what is not seen, too."""
  if mask is None:
    return seen
  return mask & seen if mask.dtype == bool else jnp.where(seen, mask, HIDDEN)


def as_bias(mask: Mask | None) -> dict[str, Mask | None]:
  """A mask as an argument of `jax.nn.dot_product_attention`, for which one of floats is a bias."""
  return {"mask": mask} if mask is None or mask.dtype == bool else {"bias": mask}


def masked(logits: Float[Array, "..."], mask: Shaped[Array, "..."]) -> Float[Array, "..."]:
  """Logits with a mask, which broadcasts to their shape."""
  return jnp.where(mask, logits, jnp.finfo(jnp.float32).min) if mask.dtype == bool else logits + mask
