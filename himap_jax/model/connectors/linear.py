"""One linear layer, whose weight and bias are the connector's own."""

from himap_jax.model.config import LinearConfig
from himap_jax.model.kernels import Kernels
from himap_jax.model.linear import Linear


def linear_connector(config: LinearConfig, width: int, kernels: Kernels) -> Linear:
  """The projector of Llama-3.2-Vision."""
  del config
  return Linear(width, kernels, use_bias=True)
