"""Model sizes as fields of a config.json, for studies without weights."""

from typing import Any

from himap_jax.engine.accounting import method_inputs
from himap_jax.families import from_hf
from himap_jax.inputs import ImageSize
from himap_jax.model.config import ModelConfig
from himap_jax.model.towers import abstract_images
from himap_jax.pruning.config import PruningConfig
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
_SIGLIP_SO400M = {
  "model_type": "siglip_vision_model",
  **_sizes(1152, 4304, 26, 16),
  **{"image_size": 384, "patch_size": 14, "vision_use_head": False},
}
_GEMMA_3 = {
  "model_type": "gemma3_text",
  **_sizes(2560, 10_240, 34, 8, 4),
  **{"head_dim": 256, "sliding_window": 1024, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
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


_INTERNVIT_300M = {
  "model_type": "internvl_vision",
  **_sizes(1024, 4096, 24, 16),
  **{"image_size": 448, "patch_size": 14, "attention_bias": True},
}
_QWEN25_05B = {
  "model_type": "qwen2",
  **_sizes(896, 4864, 24, 14, 2),
  **{"vocab_size": 151_674, "max_position_embeddings": 32_768, "tie_word_embeddings": False},
  "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
}
_SIGLIP_BASE = {**_sizes(768, 3072, 12, 12), "image_size": 512, "patch_size": 16}
_SMOLLM2_135M = {
  "model_type": "llama",
  **_sizes(576, 1536, 30, 9, 3),
  **{"vocab_size": 49_280, "max_position_embeddings": 8192, "tie_word_embeddings": False, "rms_norm_eps": 1e-5},
  "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
}

# Of the smallest models; from memory where they are not the defaults of transformers.
_QWEN2_TOWER = {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4}
_QWEN2_5_TOWER = {"depth": 32, "hidden_size": 1280, "out_hidden_size": 2048, "num_heads": 16, "intermediate_size": 3420}
_QWEN3_TOWER = {"depth": 24, "hidden_size": 1024, "out_hidden_size": 2048, "num_heads": 16, "intermediate_size": 4096}
_QWEN3_TOWER |= {"deepstack_visual_indexes": [5, 11, 17]}


def _qwen(model_type: str, vision: dict[str, Any], *sizes: int, rope_theta: float = 1e6, **text: Any) -> dict[str, Any]:
  """Fields of a config.json of Qwen2-VL to Qwen3-VL with a tied decoder of the given `_sizes`."""
  rope = {"rope_type": "default", "rope_theta": rope_theta}
  text |= {"vocab_size": 151_936, "rms_norm_eps": 1e-6, "rope_parameters": rope, **_sizes(*sizes)}
  return {"model_type": model_type, "tie_word_embeddings": True, "vision_config": vision, "text_config": text}


# 24 x 24 = 576 image tokens, but the 256 queries of Qwen-VL, 16 x 16 in its successors, one tile of InternVL3 (256) and
# SmolVLM (64), the 16 x 16 averages of Gemma 3, the 4 x 1601 of Llama-3.2-Vision, and `_TILED`.
GEOMETRIES: dict[str, dict[str, Any]] = {
  "demo": _llava(_DINOV2_SMALL, _SMOLLM2, 576, 1536, 30, 9, 3, rope_theta=100_000.0),  # DINOv2-S and SmolLM2-135M
  "1b": _llava(_CLIP_LARGE, _VICUNA, 2048, 5632, 22, 32, 4),  # CLIP ViT-L/14 and TinyLlama-1.1B
  "7b": _llava(_CLIP_LARGE, _VICUNA, 4096, 11_008, 32, 32, 32),  # LLaVA-1.5-7B
  "13b": _llava(_CLIP_LARGE, _VICUNA, 5120, 13_824, 40, 40, 40),  # LLaVA-1.5-13B
  "internvl_7b": _llava(_INTERNVIT_6B, _VICUNA, 4096, 11_008, 32, 32, 32)  # InternVL-Chat-V1.0-7B
  | {"vision_feature_layer": -4},
  "internvl3_1b": {"model_type": "internvl", "vision_config": _INTERNVIT_300M, "text_config": _QWEN25_05B},
  "smolvlm_256m": {"model_type": "smolvlm", "vision_config": _SIGLIP_BASE, "text_config": _SMOLLM2_135M}
  | {"scale_factor": 4, "image_token_id": 49_190},
  "qwen_vl_7b": {"model_type": "qwen", "visual": _VIT_BIGG | {"image_start_id": 151_857}},  # Qwen-VL-Chat-7B
  "llava_next_7b": _llava(_CLIP_LARGE, _VICUNA, 4096, 11_008, 32, 32, 32)  # LLaVA-NeXT with Vicuna-7B
  | {"model_type": "llava_next"},
  "llava_onevision_0.5b": {  # LLaVA-OneVision with Qwen2-0.5B
    "model_type": "llava_onevision",
    "vision_config": _SIGLIP_SO400M,
    "text_config": {"model_type": "qwen2", "vocab_size": 152_000, "max_position_embeddings": 32_768}
    | {"tie_word_embeddings": True, **_sizes(896, 4864, 24, 14, 2)},
  },
  "qwen2_vl_2b": _qwen("qwen2_vl", _QWEN2_TOWER, 1536, 8960, 28, 12, 2, max_position_embeddings=32_768),
  "qwen2_5_vl_3b": _qwen("qwen2_5_vl", _QWEN2_5_TOWER, 2048, 11_008, 36, 16, 2, max_position_embeddings=128_000),
  "qwen3_vl_2b": _qwen(
    "qwen3_vl", _QWEN3_TOWER, 2048, 6144, 28, 16, 8, rope_theta=5e6, max_position_embeddings=262_144
  ),
  "gemma3_4b": {  # Gemma 3 4B
    "model_type": "gemma3",
    "mm_tokens_per_image": 256,
    "vision_config": _SIGLIP_SO400M | {"num_hidden_layers": 27, "image_size": 896},
    "text_config": _GEMMA_3,
  },
  "mllama_11b": {"model_type": "mllama", **_MLLAMA},  # Llama-3.2-11B-Vision; the other sizes are transformers' defaults
}
# Sides of pictures, in pixels, for towers that were trained on others, or on any; by tower and the side of its training.
_SIDES = {("internvl_vision", 224): 336, ("qwen_vl_vision", 224): 448}
_ANY_SIZE = {"qwen2_vl_vision": 448, "qwen2_5_vl_vision": 448, "qwen3_vl_vision": 512}
# A picture of 640 x 480 pixels in models with newlines, by the number of taps: LLaVA-NeXT and LLaVA-OneVision.
_TILED = {1: ImageSize(5, 2340), 4: ImageSize(5, 2929)}


def model_of(name: str) -> ModelConfig:
  """The sizes of a geometry of `GEOMETRIES`."""
  return from_hf(GEOMETRIES[name])


def image_shape(config: ModelConfig) -> tuple[int, int]:
  """Height and width, in pixels, of the model's pictures, or of their tiles."""
  kind, side = config.vision.model_type, config.vision.image_size
  side = _ANY_SIZE.get(kind) or _SIDES.get((kind, side), side)
  return side, side


def image_size(config: ModelConfig) -> ImageSize:
  """Tiles (or patches) and image tokens of a picture."""
  if config.has_newline:
    return _TILED[config.num_taps]
  shape = image_shape(config)
  return ImageSize(len(abstract_images(config.vision, *shape).pixels), config.num_image_tokens(*shape))


def num_image_tokens(config: ModelConfig) -> int:
  """Image tokens of a picture of `image_size`."""
  return image_size(config).num_tokens


def schedule_of(config: ModelConfig, method: str) -> Schedule:
  """A method's own schedule for a picture of `image_size`."""
  return PruningConfig(method).schedule(num_image_tokens=num_image_tokens(config), **method_inputs(config))
