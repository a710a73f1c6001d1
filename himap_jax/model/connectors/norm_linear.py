"""A norm and a linear map.

Axes: B batch, N image tokens, F features, D width of the decoder.
"""

import flax.linen as nn
from jaxtyping import Array, Float

from himap_jax.model.config import NormLinearConfig
from himap_jax.model.kernels import Kernels
from himap_jax.model.linear import Linear, RMSNorm


class NormLinearConnector(nn.Module):
  """Gemma 3's projector after its pooling (arXiv 2503.19786), which is the tower's."""

  config: NormLinearConfig
  width: int
  kernels: Kernels

  @nn.compact
  def __call__(self, features: Float[Array, "B N F"]) -> Float[Array, "B N D"]:
    x = RMSNorm(self.config.rms_norm_eps, offset=True, name="mm_soft_emb_norm")(features)
    return Linear(self.width, self.kernels, name="mm_input_projection")(x)
