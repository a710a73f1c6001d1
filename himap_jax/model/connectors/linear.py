"""One linear layer.

Axes: B batch, N image tokens, F features, D width of the decoder.
"""

import flax.linen as nn
from jaxtyping import Array, Float

from himap_jax.model.config import LinearConfig
from himap_jax.model.kernels import Kernels
from himap_jax.model.linear import Linear


class LinearConnector(nn.Module):
  """The projector of Idefics3 and of Llama-3.2-Vision."""

  config: LinearConfig
  width: int
  kernels: Kernels

  @nn.compact
  def __call__(self, features: Float[Array, "B N F"]) -> Float[Array, "B N D"]:
    return Linear(self.width, self.kernels, use_bias=self.config.use_bias, name="linear")(features)
