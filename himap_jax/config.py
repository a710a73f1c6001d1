"""The model's configuration, read from a checkpoint's `config.json`; nothing else in the library knows a size."""

import dataclasses
import pathlib
from typing import Any

from checkpoints_convert.source import first_line, read_json
from himap_jax.linear import ACTIVATIONS

VISION_TOWERS = ("clip_vision_model", "siglip_vision_model", "dinov2")
TEXT_MODELS = ("llama",)
ROPE_TYPES = ("default", "linear", "llama3")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """A vision tower.

  Attributes:
    model_type: one of `VISION_TOWERS`.
    hidden_size: width of the tower.
    intermediate_size: width of its feed-forward.
    num_hidden_layers: layers in the checkpoint; only those up to the last feature layer are run.
    num_attention_heads: heads.
    image_size: side in pixels of the square the position embedding was trained on.
    patch_size: side of a patch in pixels.
    hidden_act: activation of the feed-forward.
    layer_norm_eps: epsilon of the layer norms.
    qkv_bias: whether query, key and value have biases (DINOv2).
  """

  model_type: str
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  image_size: int
  patch_size: int
  hidden_act: str
  layer_norm_eps: float
  qkv_bias: bool = True

  @property
  def has_class_token(self) -> bool:
    return self.model_type != "siglip_vision_model"


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Rotary position embedding: base `theta`, scaling `rope_type` and, for the scaled types, its parameters."""

  theta: float
  rope_type: str = "default"
  factor: float = 1.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """A LLaMA-family decoder; the names are those of `config.json`."""

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int
  rms_norm_eps: float
  max_position_embeddings: int
  tie_word_embeddings: bool
  attention_bias: bool
  mlp_bias: bool
  hidden_act: str
  rope: RopeConfig


@dataclasses.dataclass(frozen=True)
class LlavaConfig:
  """A LLaVA model.

  Attributes:
    vision: the tower.
    text: the decoder.
    image_token_id: the token that stands for one image token in `tokens`.
    vision_feature_layers: indices into the tower's hidden states (0 is the embedding), non-negative.
    vision_feature_select_strategy: `default` drops the class token, `full` keeps every token.
    projector_hidden_act: activation between the projector's two linear layers.
    projector_bias: whether these have biases.
  """

  vision: VisionConfig
  text: TextConfig
  image_token_id: int
  vision_feature_layers: tuple[int, ...]
  vision_feature_select_strategy: str
  projector_hidden_act: str
  projector_bias: bool

  @property
  def num_features(self) -> int:
    """Width of what the projector reads."""
    return len(self.vision_feature_layers) * self.vision.hidden_size

  def num_image_tokens(self, height: int, width: int) -> int:
    """Image tokens of a picture of `height` × `width` pixels."""
    patches = (height // self.vision.patch_size) * (width // self.vision.patch_size)
    keeps_class_token = self.vision.has_class_token and self.vision_feature_select_strategy == "full"
    loses_patch = not self.vision.has_class_token and self.vision_feature_select_strategy == "default"
    return patches + keeps_class_token - loses_patch


def load_config(directory: str | pathlib.Path) -> LlavaConfig:
  """Reads `config.json` of a checkpoint in the Hugging Face LLaVA layout; absent fields have transformers' defaults.

  Raises:
    ValueError: there is no readable `config.json`, or it describes a model that the library does not run.
  """
  path = pathlib.Path(directory) / "config.json"
  return from_hf(read_json(path), where=str(path))


def from_hf(fields: dict[str, Any], *, where: str = "config.json") -> LlavaConfig:
  """Builds a `LlavaConfig` from the fields of a Hugging Face `config.json`.

  Raises:
    ValueError: a model type, tower or RoPE scaling that the library does not run; the message names those it does.
  """
  if fields.get("model_type") != "llava":
    raise ValueError(f"{where}: model_type is {fields.get('model_type')!r}; this library runs 'llava'")
  vision_type = (fields.get("vision_config") or {}).get("model_type", "clip_vision_model")
  text_type = (fields.get("text_config") or {}).get("model_type", "llama")
  _require(vision_type in VISION_TOWERS, where, "vision tower", vision_type, VISION_TOWERS)
  _require(text_type in TEXT_MODELS, where, "language model", text_type, TEXT_MODELS)

  from transformers import LlavaConfig as HfLlavaConfig  # slow to import, so only where a checkpoint is opened

  try:
    complete = HfLlavaConfig(**{key: value for key, value in fields.items() if key != "model_type"})
  except Exception as error:  # transformers has its own kinds of errors for fields that it cannot read
    raise ValueError(f"{where}: transformers cannot read it ({first_line(error)})") from error
  layers = complete.vision_feature_layer
  layers = [layers] if isinstance(layers, int) else list(layers)
  depth = complete.vision_config.num_hidden_layers
  for layer in layers:
    if not -depth - 1 <= layer <= depth:
      raise ValueError(f"{where}: vision_feature_layer {layer} is out of range for a tower of {depth} layers")
  if not any(layer % (depth + 1) for layer in layers):
    raise ValueError(f"{where}: vision_feature_layer {layers} names no layer of the tower")
  vision = _vision(complete.vision_config, where)
  text = _text(complete.text_config, fields.get("tie_word_embeddings"), where)
  for name in (vision.hidden_act, text.hidden_act, complete.projector_hidden_act):
    _require(name in ACTIVATIONS, where, "activation", name, tuple(ACTIVATIONS))
  return LlavaConfig(
    vision=vision,
    text=text,
    image_token_id=complete.image_token_id,
    vision_feature_layers=tuple(layer % (depth + 1) for layer in layers),
    vision_feature_select_strategy=complete.vision_feature_select_strategy,
    projector_hidden_act=complete.projector_hidden_act,
    projector_bias=complete.multimodal_projector_bias,
  )


def _require(condition: bool, where: str, what: str, found: Any, known: tuple[str, ...]) -> None:
  if not condition:
    raise ValueError(f"{where}: {what} {found!r} is not supported; supported: {', '.join(known)}")


def _vision(hf: Any, where: str) -> VisionConfig:
  common = dict(
    model_type=hf.model_type,
    hidden_size=hf.hidden_size,
    num_hidden_layers=hf.num_hidden_layers,
    num_attention_heads=hf.num_attention_heads,
    image_size=hf.image_size,
    patch_size=hf.patch_size,
    hidden_act=hf.hidden_act,
    layer_norm_eps=hf.layer_norm_eps,
  )
  if hf.model_type != "dinov2":
    return VisionConfig(intermediate_size=hf.intermediate_size, **common)
  if hf.use_swiglu_ffn:
    raise ValueError(f"{where}: DINOv2 with a SwiGLU feed-forward (use_swiglu_ffn) is not supported")
  return VisionConfig(intermediate_size=int(hf.hidden_size * hf.mlp_ratio), qkv_bias=hf.qkv_bias, **common)


def _text(hf: Any, tied: bool | None, where: str) -> TextConfig:
  rope = dict(hf.rope_parameters)
  _require(rope.get("rope_type", "default") in ROPE_TYPES, where, "RoPE scaling", rope.get("rope_type"), ROPE_TYPES)
  known = {field.name for field in dataclasses.fields(RopeConfig)}
  scaling = {key: value for key, value in rope.items() if key in known}
  return TextConfig(
    vocab_size=hf.vocab_size,
    hidden_size=hf.hidden_size,
    intermediate_size=hf.intermediate_size,
    num_hidden_layers=hf.num_hidden_layers,
    num_attention_heads=hf.num_attention_heads,
    num_key_value_heads=hf.num_key_value_heads or hf.num_attention_heads,
    head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
    rms_norm_eps=hf.rms_norm_eps,
    max_position_embeddings=hf.max_position_embeddings,
    tie_word_embeddings=bool(hf.tie_word_embeddings or tied),
    attention_bias=hf.attention_bias,
    mlp_bias=hf.mlp_bias,
    hidden_act=hf.hidden_act,
    rope=RopeConfig(theta=rope["rope_theta"], **scaling),
  )
