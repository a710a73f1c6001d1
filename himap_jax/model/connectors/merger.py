"""The features of a square of patches to one image token.

Axes: B batch, N image tokens, F features, D width of the decoder.
"""

import flax.linen as nn
from jaxtyping import Array, Float

from himap_jax.model.config import MergerConfig
from himap_jax.model.kernels import Kernels
from himap_jax.model.linear import ACTIVATIONS, NORMS, Linear


class Merger(nn.Module):
  """Qwen2-VL's patch merger (arXiv 2409.12191), whose features hold those of all patches of a square."""

  config: MergerConfig
  width: int
  kernels: Kernels

  @nn.compact
  def __call__(self, features: Float[Array, "B N F"]) -> Float[Array, "B N D"]:
    c, width = self.config, features.shape[-1]
    parts = features.reshape(*features.shape[:2], c.num_parts, width // c.num_parts)
    x = NORMS[c.norm_type](c.layer_norm_eps, name="norm")(parts).reshape(features.shape)
    x = ACTIVATIONS["gelu"](Linear(width, self.kernels, use_bias=True, name="linear_1")(x))
    return Linear(self.width, self.kernels, use_bias=True, name="linear_2")(x)
