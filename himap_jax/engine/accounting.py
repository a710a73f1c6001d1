"""Model sizes for the accounting of pruning costs; FLOPs are multiplications in matrix products."""

from himap_jax.model.config import LinearConfig, ModelConfig, ResamplerConfig, VisionConfig
from himap_jax.model.towers.mllama import MULTIPLE
from himap_jax.pruning.cost import ModelSizes


def model_sizes(config: ModelConfig, image_shape: tuple[int, int]) -> ModelSizes:
  """The sizes that determine a model's costs, with pictures of `image_shape`, `(height, width)` in pixels."""
  text, vision = config.text, config.vision
  width, num_features = text.hidden_size, config.num_features(*image_shape)
  if isinstance(config.connector, ResamplerConfig):
    per_token, connector_flops = 0, _resampler_flops(config, num_features)
  else:
    per_token = vision.num_features * width
    per_token += 0 if isinstance(config.connector, LinearConfig) else width**2
    connector_flops = num_features * per_token
  return ModelSizes(
    num_layers=text.num_hidden_layers,
    hidden_size=width,
    intermediate_size=text.intermediate_size,
    num_heads=text.num_attention_heads,
    num_key_heads=text.num_key_value_heads,
    head_dim=text.head_dim,
    vocab_size=text.vocab_size,
    tower_width=vision.hidden_size,
    tower_heads=vision.num_attention_heads,
    num_features=vision.num_features,
    tower_flops=_tower_flops(vision, num_features),
    connector_flops=connector_flops,
    connector_flops_per_token=per_token,
    cross_layers=text.cross_attention_layers,
  )


def _tower_flops(vision: VisionConfig, num_features: int) -> int:
  """4nw² + 2n²w + 2nwm per layer for n tokens, width w and feed-forward width m, and the patch embedding."""
  tiles = vision.tiles_per_picture
  num_tokens = num_features + (vision.select_strategy == "default")
  num_patches = num_tokens - vision.has_class_token * tiles
  if vision.tiling is not None:
    num_tokens += -(num_features // tiles) % MULTIPLE * tiles
  w, m = vision.hidden_size, vision.intermediate_size
  layer = 4 * num_tokens * w**2 + 2 * num_tokens**2 * w + 2 * num_tokens * w * m
  return vision.num_layers_run * layer + num_patches * 3 * vision.patch_size**2 * w


def _resampler_flops(config: ModelConfig, num_features: int) -> int:
  """pfd + 2pd² for keys and values of p features of width f, 2npd for n queries' attention, 3nd² for the rest."""
  d, n = config.text.hidden_size, config.connector.num_queries
  return num_features * (config.vision.num_features * d + 2 * d**2) + 2 * n * num_features * d + 3 * n * d**2
