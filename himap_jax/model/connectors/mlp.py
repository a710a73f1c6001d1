"""Two linear layers with an activation between them, and maybe a norm before them.

Axes: B batch, N image tokens, F features, D width of the decoder.
"""

import flax.linen as nn
from jaxtyping import Array, Float

from himap_jax.model.config import ConnectorConfig
from himap_jax.model.kernels import Kernels
from himap_jax.model.linear import ACTIVATIONS, LayerNorm, Linear


class MlpConnector(nn.Module):
  """The projector of LLaVA, and with the norm of InternVL."""

  config: ConnectorConfig
  width: int
  kernels: Kernels

  @nn.compact
  def __call__(self, features: Float[Array, "B N F"]) -> Float[Array, "B N D"]:
    use_bias, epsilon = self.config.use_bias, self.config.layer_norm_eps
    if epsilon is not None:
      features = LayerNorm(epsilon, name="layer_norm")(features)
    x = Linear(self.width, self.kernels, use_bias=use_bias, name="linear_1")(features)
    x = ACTIVATIONS[self.config.hidden_act](x)
    return Linear(self.width, self.kernels, use_bias=use_bias, name="linear_2")(x)
