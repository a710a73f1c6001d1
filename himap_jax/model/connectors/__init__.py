"""Connectors: from tower features to the decoder's width. A connector is one module and one entry of `CONNECTORS`."""

from himap_jax.model.config import ConnectorConfig, LinearConfig, ResamplerConfig
from himap_jax.model.connectors.linear import linear_connector
from himap_jax.model.connectors.mlp import MlpConnector
from himap_jax.model.connectors.resampler import Resampler

CONNECTORS = {ConnectorConfig: MlpConnector, LinearConfig: linear_connector, ResamplerConfig: Resampler}
