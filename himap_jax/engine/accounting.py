"""Model sizes for the accounting of pruning costs."""

from himap_jax.model.config import ModelConfig
from himap_jax.pruning.cost import ModelSizes


def model_sizes(config: ModelConfig) -> ModelSizes:
  """The sizes of a model that determine its costs."""
  text, vision = config.text, config.vision
  width = text.hidden_size
  return ModelSizes(
    num_layers=text.num_hidden_layers,
    hidden_size=width,
    intermediate_size=text.intermediate_size,
    num_heads=text.num_attention_heads,
    num_key_heads=text.num_key_value_heads,
    head_dim=text.head_dim,
    vocab_size=text.vocab_size,
    tower_layers=vision.num_layers_run,
    tower_width=vision.hidden_size,
    tower_feed_forward=vision.intermediate_size,
    tower_heads=vision.num_attention_heads,
    patch_size=vision.patch_size,
    num_features=vision.num_features,
    has_class_token=vision.has_class_token,
    drops_first_token=vision.select_strategy == "default",
    connector_flops_per_token=vision.num_features * width + width**2,
  )
