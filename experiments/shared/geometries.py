"""Model sizes as fields of a config.json, for studies without weights."""

from typing import Any

from himap_jax.families import from_hf
from himap_jax.model.config import ModelConfig
from himap_jax.pruning.methods import PruningConfig
from himap_jax.pruning.schedule import Schedule


def _sizes(*sizes: int) -> dict[str, int]:
  """Width, feed-forward width, layers, heads and, for a decoder, key heads of a transformer."""
  names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
  return dict(zip(names, sizes, strict=False))


_PATCHES = {"image_size": 336, "patch_size": 14}
_CLIP_LARGE = {"model_type": "clip_vision_model", **_sizes(1024, 4096, 24, 16), **_PATCHES, "projection_dim": 768}
_DINOV2_SMALL = {"model_type": "dinov2", **_sizes(384, 1536, 12, 6), **_PATCHES, "mlp_ratio": 4}
_VICUNA = {"vocab_size": 32_064, "max_position_embeddings": 4096, "tie_word_embeddings": False}
_SMOLLM2 = {"vocab_size": 49_152, "max_position_embeddings": 8192, "tie_word_embeddings": True}


def _llava(vision: dict[str, Any], text: dict[str, Any], *sizes: int, rope_theta: float = 10_000.0) -> dict[str, Any]:
  """Fields of a Hugging Face config.json with a LLaMA decoder of the given `_sizes`."""
  rope = {"rope_type": "default", "rope_theta": rope_theta}
  return {
    "model_type": "llava",
    "image_token_index": 1,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vision_config": vision,
    "text_config": {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_parameters": rope, **_sizes(*sizes), **text},
  }


_INTERNVIT_6B = {
  "model_type": "internvl_vision",
  **_sizes(3200, 12_800, 48, 25),
  **{"image_size": 224, "patch_size": 14, "use_qk_norm": True, "norm_type": "rms_norm"},
}
_MLLAMA = {
  "vision_config": {"image_size": 560, "vision_output_dim": 7680},
  "text_config": {
    "rope_parameters": {
      **{
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
      },
      "original_max_position_embeddings": 8192,
    }
  },
}
_VIT_BIGG = {"width": 1664, "layers": 48, "heads": 16, "mlp_ratio": 4.9231, "patch_size": 14, "image_size": 448}

# 24 x 24 = 576 image tokens, but the 256 queries of Qwen-VL and the 4 x 1601 of Llama-3.2-Vision.
GEOMETRIES: dict[str, dict[str, Any]] = {
  "demo": _llava(_DINOV2_SMALL, _SMOLLM2, 576, 1536, 30, 9, 3, rope_theta=100_000.0),  # DINOv2-S and SmolLM2-135M
  "1b": _llava(_CLIP_LARGE, _VICUNA, 2048, 5632, 22, 32, 4),  # CLIP ViT-L/14 and TinyLlama-1.1B
  "7b": _llava(_CLIP_LARGE, _VICUNA, 4096, 11_008, 32, 32, 32),  # LLaVA-1.5-7B
  "13b": _llava(_CLIP_LARGE, _VICUNA, 5120, 13_824, 40, 40, 40),  # LLaVA-1.5-13B
  "internvl_7b": _llava(_INTERNVIT_6B, _VICUNA, 4096, 11_008, 32, 32, 32)  # InternVL-Chat-V1.0-7B
  | {"vision_feature_layer": -4},
  "qwen_vl_7b": {"model_type": "qwen", "visual": _VIT_BIGG | {"image_start_id": 151_857}},  # Qwen-VL-Chat-7B
  "mllama_11b": {"model_type": "mllama", **_MLLAMA},  # Llama-3.2-11B-Vision; the other sizes are transformers' defaults
}
# Sides of pictures, in pixels, for towers that were trained on others.
_SIDES = {"internvl_vision": 336, "qwen_vl_vision": 448}


def model_of(name: str) -> ModelConfig:
  return from_hf(GEOMETRIES[name])


def image_shape(config: ModelConfig) -> tuple[int, int]:
  """Height and width, in pixels, of the model's pictures."""
  side = _SIDES.get(config.vision.model_type, config.vision.image_size)
  return side, side


def num_image_tokens(config: ModelConfig) -> int:
  return config.num_image_tokens(*image_shape(config))


def schedule_of(config: ModelConfig, method: str) -> Schedule:
  return PruningConfig(method).schedule(num_image_tokens=num_image_tokens(config), **config.method_inputs)
