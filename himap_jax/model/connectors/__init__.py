"""Connectors: from tower features to the decoder's width. A connector is one module and one entry of `CONNECTORS`."""

from himap_jax.model.config import ConnectorConfig, LinearConfig, MergerConfig, NormLinearConfig, ResamplerConfig
from himap_jax.model.connectors.linear import LinearConnector
from himap_jax.model.connectors.merger import Merger
from himap_jax.model.connectors.mlp import MlpConnector
from himap_jax.model.connectors.norm_linear import NormLinearConnector
from himap_jax.model.connectors.resampler import Resampler

CONNECTORS = {
  ConnectorConfig: MlpConnector,
  LinearConfig: LinearConnector,
  NormLinearConfig: NormLinearConnector,
  MergerConfig: Merger,
  ResamplerConfig: Resampler,
}
