"""Connectors: from tower features to the decoder's width. A connector is one module and one entry of `CONNECTORS`."""

from himap_jax.model.config import ConnectorConfig, NormLinearConfig, ResamplerConfig
from himap_jax.model.connectors.mlp import MlpConnector
from himap_jax.model.connectors.norm_linear import NormLinearConnector
from himap_jax.model.connectors.resampler import Resampler

CONNECTORS = {ConnectorConfig: MlpConnector, ResamplerConfig: Resampler, NormLinearConfig: NormLinearConnector}
