"""Model capabilities and sizes for pruning; FLOPs are multiplications in matrix products."""

from typing import Any

from himap_jax.model.config import (
  LinearConfig,
  MergerConfig,
  ModelConfig,
  NormLinearConfig,
  PatchVisionConfig,
  ResamplerConfig,
  VisionConfig,
)
from himap_jax.model.towers.mllama import MULTIPLE
from himap_jax.pruning.method import Need
from himap_jax.pruning.sizes import ModelSizes


def provides(config: ModelConfig) -> frozenset[Need]:
  """What methods can read of a model."""
  found = {
    "class_attention": config.vision.has_class_attention,
    "features": config.has_feature_per_token,
    "grid": config.has_grid,
    "sequence": not config.text.cross_attention_layers,
  }
  return frozenset(name for name, is_provided in found.items() if is_provided)


def method_inputs(config: ModelConfig) -> dict[str, Any]:
  """A model's arguments of `pruning.config.PruningConfig.schedule`."""
  text = config.text
  return dict(num_layers=text.num_hidden_layers, provides=provides(config), cross_layers=text.cross_attention_layers)


def model_sizes(config: ModelConfig, image_shape: tuple[int, ...]) -> ModelSizes:
  """The sizes that determine a model's costs.

  Args:
    image_shape: `(height, width)` of a tile in pixels; unused by towers for patches.
  """
  text, vision = config.text, config.vision
  width, is_patch = text.hidden_size, isinstance(vision, PatchVisionConfig)
  num_features = 0 if is_patch else config.num_features(*image_shape)
  if isinstance(config.connector, MergerConfig):
    per_token = vision.num_features * (vision.num_features + width)
    connector_flops = (1 + len(vision.deepstack_layers)) * per_token // vision.merge_size**2
  elif isinstance(config.connector, ResamplerConfig):
    per_token, connector_flops = 0, _resampler_flops(config, num_features)
  else:
    is_single = isinstance(config.connector, LinearConfig | NormLinearConfig)
    per_token = vision.num_features * width + (0 if is_single else width**2)
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
    tower_flops=_patch_flops(vision) if is_patch else _tower_flops(vision, vision.num_patches(*image_shape)),
    tower_flops_per_pair=2 * vision.num_layers_run * vision.hidden_size if is_patch else 0,
    connector_flops=connector_flops,
    connector_flops_per_token=per_token,
    cross_layers=text.cross_attention_layers,
  )


def _tower_flops(vision: VisionConfig, num_patches: int) -> int:
  """4nw² + 2n²tw + 2nwm per layer for n tokens, width w and feed-forward width m, and the patch embedding.

  The tokens attend to those of all t tiles of a picture that see each other.
  """
  num_tokens = num_patches + vision.has_class_token
  if vision.tiling is not None:
    num_tokens += -num_tokens % MULTIPLE
  w, m = vision.hidden_size, vision.intermediate_size
  attention = 2 * num_tokens**2 * vision.tiles_per_picture * w
  layer = 4 * num_tokens * w**2 + attention + 2 * num_tokens * w * m
  return vision.num_layers_run * layer + num_patches * 3 * vision.patch_size**2 * w


def _patch_flops(vision: PatchVisionConfig) -> int:
  """As `_tower_flops` for one patch, without attention to others; 3wm if the feed-forward is gated."""
  w, m = vision.hidden_size, vision.intermediate_size
  layer = 4 * w**2 + (3 if vision.is_gated else 2) * w * m
  return vision.num_layers_run * layer + 3 * vision.patch_size**2 * w


def _resampler_flops(config: ModelConfig, num_features: int) -> int:
  """pfd + 2pd² for keys and values of p features of width f, 2npd for n queries' attention, 3nd² for the rest."""
  d, n = config.text.hidden_size, config.connector.num_queries
  return num_features * (config.vision.num_features * d + 2 * d**2) + 2 * n * num_features * d + 3 * n * d**2
