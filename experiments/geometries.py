"""The sizes of models, as the fields of a config.json: what is studied without weights."""

from typing import Any

from himap_jax.config import LlavaConfig, from_hf
from himap_jax.methods import build_schedule
from himap_jax.schedule import Schedule

_CLIP_LARGE = {
  "model_type": "clip_vision_model",
  "hidden_size": 1024,
  "intermediate_size": 4096,
  "num_hidden_layers": 24,
  "num_attention_heads": 16,
  "image_size": 336,
  "patch_size": 14,
  "projection_dim": 768,
}
_DINOV2_SMALL = {
  "model_type": "dinov2",
  "hidden_size": 384,
  "num_hidden_layers": 12,
  "num_attention_heads": 6,
  "mlp_ratio": 4,
  "image_size": 336,
  "patch_size": 14,
}


def _llava(vision: dict[str, Any], *, rope_theta: float, **text: Any) -> dict[str, Any]:
  """The fields of a Hugging Face config.json; the text's are those of a LLaMA decoder."""
  return {
    "model_type": "llava",
    "image_token_index": 1,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vision_config": vision,
    "text_config": {
      "model_type": "llama",
      "rms_norm_eps": 1e-5,
      "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
      **text,
    },
  }


# All have 24 x 24 = 576 image tokens.
GEOMETRIES: dict[str, dict[str, Any]] = {
  # DINOv2 ViT-S/14 and SmolLM2-135M, as in the demo model.
  "demo": _llava(
    _DINOV2_SMALL,
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
    rope_theta=100_000.0,
  ),
  # CLIP ViT-L/14 and TinyLlama-1.1B.
  "1b": _llava(
    _CLIP_LARGE,
    vocab_size=32_064,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
    rope_theta=10_000.0,
  ),
  # LLaVA-1.5-7B.
  "7b": _llava(
    _CLIP_LARGE,
    vocab_size=32_064,
    hidden_size=4096,
    intermediate_size=11_008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
    rope_theta=10_000.0,
  ),
  # LLaVA-1.5-13B.
  "13b": _llava(
    _CLIP_LARGE,
    vocab_size=32_064,
    hidden_size=5120,
    intermediate_size=13_824,
    num_hidden_layers=40,
    num_attention_heads=40,
    num_key_value_heads=40,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
    rope_theta=10_000.0,
  ),
}


def model_of(name: str) -> LlavaConfig:
  """A geometry's configuration."""
  return from_hf(GEOMETRIES[name])


def num_image_tokens(config: LlavaConfig) -> int:
  """Of a picture of the tower's own size."""
  return config.num_image_tokens(*[config.vision.image_size] * 2)


def schedule_of(config: LlavaConfig, method: str) -> Schedule:
  """A method's default schedule."""
  return build_schedule(
    method,
    num_layers=config.text.num_hidden_layers,
    num_image_tokens=num_image_tokens(config),
    has_class_token=config.vision.has_class_token,
  )
