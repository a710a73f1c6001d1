"""The fields of a `config.json`: their types and bounds, checked before anything is built of them."""

import math
from collections.abc import Mapping
from typing import Any

from himap_jax.errors import UserError
from himap_jax.model.config import ModelConfig

# Whole numbers from 1 to these; far above every published model, and far below what would exhaust memory or time.
LARGEST = {
  **dict.fromkeys(("num_hidden_layers", "depth", "layers", "num_global_layers"), 512),
  **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "attention_heads", "num_heads", "heads"), 1024),
  **dict.fromkeys(("hidden_size", "embed_dim", "width", "out_hidden_size", "output_dim", "vision_output_dim"), 1 << 17),
  **dict.fromkeys(("head_dim", "kv_channels", "image_size", "patch_size", "window_size"), 8192),
  **dict.fromkeys(("spatial_merge_size", "temporal_patch_size", "scale_factor", "max_num_tiles"), 64),
  **dict.fromkeys(("n_queries", "mm_tokens_per_image", "num_position_embeddings"), 1 << 16),
  **dict.fromkeys(("intermediate_size", "query_pre_attn_scalar"), 1 << 20),
  **dict.fromkeys(("max_position_embeddings", "seq_length", "sliding_window"), 1 << 30),
  **dict.fromkeys(("original_max_position_embeddings", "sliding_window_pattern"), 1 << 30),
  "vocab_size": 1 << 22,
}
TOKENS = ("image_token_id", "image_token_index", "image_start_id")
POSITIVE = (
  "rms_norm_eps",
  "layer_norm_eps",
  "layer_norm_epsilon",
  "rope_theta",
  "rotary_emb_base",
  "mlp_ratio",
  "factor",
  "low_freq_factor",
  "high_freq_factor",
  "partial_rotary_factor",
  "rotary_pct",
  "downsample_ratio",
)
TEXTS = (
  "model_type",
  "hidden_act",
  "hidden_activation",
  "projector_hidden_act",
  "rope_type",
  "norm_type",
  "vision_feature_select_strategy",
  "vision_aspect_ratio",
)
ROPES = ("rope_parameters", "rope_scaling")
OBJECTS = ("vision_config", "text_config", "visual", *ROPES, "full_attention", "sliding_attention")
NUMBER_LISTS = ("mrope_section", "fullatt_block_indexes", "deepstack_visual_indexes", "intermediate_layers_indices")
MOST_PATCHES = 1 << 14  # of a picture or tile of the size that a tower was trained on
NULLABLE = (
  "head_dim",
  "num_key_value_heads",
  "sliding_window",
  "sliding_window_pattern",
  "hidden_act",
  "hidden_activation",
  "vision_config",
  "text_config",
  *ROPES,
  *TOKENS,
)
_OF_TWO = ("image_size", "patch_size")  # a side, or height and width


def check_fields(fields: Mapping[Any, Any], where: str) -> None:
  """Raises `UserError` for a known field of another type or out of bounds, in the whole file."""
  for name, value in fields.items():
    if value is not None or name not in NULLABLE:
      _check(name, value, where)
    if isinstance(value, Mapping):
      check_fields(value, where)


def _check(name: Any, value: Any, where: str) -> None:
  own = value if name in _OF_TWO and isinstance(value, list) and len(value) == 2 else [value]
  if name in LARGEST:
    needed, is_fit = f"a whole number from 1 to {LARGEST[name]:,}", all(_is_whole(x, 1, LARGEST[name]) for x in own)
  elif name in TOKENS:
    needed, is_fit = "the id of a token", _is_whole(value, 0, LARGEST["vocab_size"])
  elif name in POSITIVE:
    needed, is_fit = "a number above 0", type(value) in (int, float) and 0 < value < math.inf
  elif name in TEXTS:
    needed, is_fit = "a text", isinstance(value, str)
  elif name in OBJECTS:
    needed, is_fit = "an object", isinstance(value, dict)
  elif name in NUMBER_LISTS:
    most = LARGEST["head_dim"]
    needed, is_fit = "a list of whole numbers", isinstance(value, list) and all(_is_whole(x, 0, most) for x in value)
  else:
    return
  if not is_fit:
    raise UserError(f"{where}: {name} is {repr(value)[:80]}; needed: {needed}")


def _is_whole(value: Any, least: int, most: int) -> bool:
  return type(value) is int and least <= value <= most


def check_sizes(config: ModelConfig, where: str) -> None:
  """Raises `UserError` for sizes that contradict each other."""
  vision, text = config.vision, config.text
  patches = (vision.image_size // vision.patch_size) ** 2
  for what, is_fit in (
    (f"a tower of width {vision.hidden_size} has no {vision.num_attention_heads} heads of equal width",
     vision.hidden_size % vision.num_attention_heads == 0),
    (f"{text.num_attention_heads} heads are no multiple of {text.num_key_value_heads} key heads",
     text.num_attention_heads % text.num_key_value_heads == 0),
    (f"heads of {text.head_dim} features of which {text.rotary_dim} are rotated; needed: an even number",
     text.rotary_dim % 2 == 0 and 0 < text.rotary_dim <= text.head_dim),
    (f"{patches:,} patches of {vision.patch_size} pixels in a picture of {vision.image_size}; needed: 1 to "
     f"{MOST_PATCHES:,}", 0 < patches <= MOST_PATCHES),
    (f"a feed-forward of width {vision.intermediate_size}", vision.intermediate_size > 0),
  ):  # fmt: skip
    if not is_fit:
      raise UserError(f"{where}: {what}")
