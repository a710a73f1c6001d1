"""LLaVA: a CLIP, SigLIP or DINOv2 tower, a two-layer connector and a decoder; one picture per prompt."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from checkpoints_convert.source import first_line
from himap_jax.errors import UserError, check_supported
from himap_jax.families.family import Family
from himap_jax.families.text import check_text_model, text_config
from himap_jax.inputs import Example
from himap_jax.model.config import ConnectorConfig, ModelConfig, VisionConfig
from himap_jax.model.linear import ACTIVATIONS
from himap_jax.model.towers import TOWERS

IMAGE_TAG = "<image>"
VICUNA_V1 = (
  "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
  "and polite answers to the user's questions. USER: <image>\n{question} ASSISTANT:"
)
MAX_ASPECT_RATIO = 200
MAX_PIXELS = 178_956_970  # of a picture padded to a square


def config(fields: dict[str, Any], where: str) -> ModelConfig:
  """The sizes described by a LLaVA `config.json`; absent fields take transformers' defaults.

  Raises:
    UserError: the tower, decoder, activation or RoPE scaling is not supported; the message names those that are.
  """
  vision_type = (fields.get("vision_config") or {}).get("model_type", "clip_vision_model")
  check_supported(vision_type, TOWERS, where=where, what="vision tower")
  check_text_model(fields.get("text_config") or {}, where)

  from transformers import LlavaConfig  # slow to import

  try:
    complete = LlavaConfig(**{key: value for key, value in fields.items() if key != "model_type"})
  except Exception as error:  # transformers raises types of its own for invalid fields
    raise UserError(f"{where}: transformers cannot read it ({first_line(error)})") from error
  connector = ConnectorConfig(complete.projector_hidden_act, complete.multimodal_projector_bias)
  vision = _vision(complete, where)
  text = text_config(complete.text_config, where, tied=fields.get("tie_word_embeddings"))
  for name in (vision.hidden_act, connector.hidden_act):
    check_supported(name, ACTIVATIONS, where=where, what="activation")
  return ModelConfig(vision, connector, text, complete.image_token_id)


def _vision(llava: Any, where: str) -> VisionConfig:
  hf, layers = llava.vision_config, llava.vision_feature_layer
  layers = [layers] if isinstance(layers, int) else list(layers)
  depth = hf.num_hidden_layers
  for layer in layers:
    if not -depth - 1 <= layer <= depth:
      raise UserError(f"{where}: vision_feature_layer {layer} is out of range for a tower of {depth} layers")
  if not any(layer % (depth + 1) for layer in layers):
    raise UserError(f"{where}: vision_feature_layer {layers} names no layer of the tower")
  common = dict(
    model_type=hf.model_type,
    hidden_size=hf.hidden_size,
    num_hidden_layers=depth,
    num_attention_heads=hf.num_attention_heads,
    image_size=hf.image_size,
    patch_size=hf.patch_size,
    hidden_act=hf.hidden_act,
    layer_norm_eps=hf.layer_norm_eps,
    feature_layers=tuple(layer % (depth + 1) for layer in layers),
    select_strategy=llava.vision_feature_select_strategy,
    has_class_token=hf.model_type != "siglip_vision_model",
  )
  if hf.model_type != "dinov2":
    return VisionConfig(intermediate_size=hf.intermediate_size, **common)
  if hf.use_swiglu_ffn:
    raise UserError(f"{where}: DINOv2 with a SwiGLU feed-forward (use_swiglu_ffn) is not supported")
  return VisionConfig(intermediate_size=int(hf.hidden_size * hf.mlp_ratio), qkv_bias=hf.qkv_bias, **common)


def complete(fields: dict[str, Any]) -> dict[str, Any]:
  """All fields of `config.json`, with transformers' defaults for absent ones."""
  from transformers import LlavaConfig

  full = LlavaConfig(**{key: value for key, value in fields.items() if key != "model_type"})
  return json.loads(full.to_json_string(use_diff=False))


def load_processor(directory: pathlib.Path) -> Any:
  """Loads transformers' processor (tokenizer, image processor, chat template); raises `UserError` if that fails."""
  import transformers  # slow to import

  try:
    return transformers.AutoProcessor.from_pretrained(directory, local_files_only=True)
  except (ValueError, OSError, KeyError, TypeError) as error:
    raise UserError(f"{directory}: cannot load the tokenizer and image processor ({first_line(error)})") from error


class LlavaProcessor:
  """Prepares prompts for one model; see `family.Processor`."""

  def __init__(self, processor: Any, config: ModelConfig, template: str = "chat"):
    """Checks the template and the image processor.

    Args:
      template: `vicuna_v1`, `chat` (the checkpoint's own), or a text with `<image>` and `{question}`.

    Raises:
      UserError: the template is unusable, or the image processor's pictures differ in size.
    """
    self._processor = processor
    self._config = config
    self._template = _check_template(template, processor)
    self.image_shape = self._pixels(Image.new("RGB", (64, 48))).shape[1:]
    if self._pixels(Image.new("RGB", (48, 64))).shape[1:] != self.image_shape:
      raise UserError("the checkpoint's image processor returns pictures of different sizes; a batch needs one size")
    self.patch_grid = tuple(side // config.vision.patch_size for side in self.image_shape)
    self.num_image_tokens = config.num_image_tokens(*self.image_shape)

  def prepare(self, image: Image.Image, question: str) -> Example:
    """Fills the template, tokenises it and preprocesses the picture; `<image>` in a question replaces the template's.

    Raises:
      UserError: not exactly one `<image>` in the prompt, no text after it, or a picture that is too elongated or too
        large.
    """
    text = self.prompt(question)
    count = text.count(IMAGE_TAG)
    if count != 1:
      raise UserError(f"a prompt needs exactly one {IMAGE_TAG}, but this one has {count}")
    tokenizer = self._processor.tokenizer
    has_bos = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    ids = list(tokenizer(text, add_special_tokens=not has_bos)["input_ids"])
    if ids.count(self._config.image_token_id) != 1:
      raise UserError(
        f"the tokenizer turns {IMAGE_TAG} into {ids.count(self._config.image_token_id)} image tokens "
        f"(id {self._config.image_token_id}); the checkpoint's tokenizer and config.json disagree"
      )
    start = ids.index(self._config.image_token_id)
    if start == len(ids) - 1:
      raise UserError(f"a prompt needs text after {IMAGE_TAG}: its attention decides which image tokens are kept")
    self._check_size(image)
    tokens = np.array([*ids[:start], *[ids[start]] * self.num_image_tokens, *ids[start + 1 :]], np.int32)
    slot = np.arange(len(tokens), dtype=np.int32)
    image_id = np.where((slot >= start) & (slot < start + self.num_image_tokens), 0, -1).astype(np.int32)
    return Example(tokens, image_id, slot, self._pixels(image))

  def prompt(self, question: str) -> str:
    own_image = IMAGE_TAG in question
    if self._template == "chat":
      content = [{"type": "text", "text": question}]
      if not own_image:
        content.insert(0, {"type": "image"})
      return self._processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    template = self._template
    if own_image:
      template = template.replace(IMAGE_TAG + "\n", "").replace(IMAGE_TAG, "")
    return template.replace("{question}", question)

  def decode(self, tokens: Sequence[int]) -> str:
    return self._processor.tokenizer.decode(list(tokens), skip_special_tokens=True).strip()

  def picture(self, example: Example) -> Image.Image:
    mean, std = (
      np.asarray(values, np.float32)[:, None, None]
      for values in (self._processor.image_processor.image_mean, self._processor.image_processor.image_std)
    )
    pixels = np.clip((example.pixel_values * std + mean) * 255, 0, 255).round().astype(np.uint8)
    height, width = (count * self._config.vision.patch_size for count in self.patch_grid)
    return Image.fromarray(pixels[:, :height, :width].transpose(1, 2, 0))

  def _check_size(self, image: Image.Image) -> None:
    """Refuses pictures that would exhaust memory when resized or padded to a square."""
    shortest, longest = sorted(image.size)
    if longest > MAX_ASPECT_RATIO * shortest:
      raise UserError(
        f"the picture has {image.width} x {image.height} pixels; one side may be at most {MAX_ASPECT_RATIO} "
        "times the other"
      )
    if getattr(self._processor.image_processor, "do_pad", False) and longest**2 > MAX_PIXELS:
      raise UserError(
        f"the picture has {image.width} x {image.height} pixels; padded to a square it is above the limit of "
        f"{MAX_PIXELS:,}"
      )

  def _pixels(self, image: Image.Image) -> Float[np.ndarray, "3 h w"]:
    return np.asarray(self._processor.image_processor(image, return_tensors="np")["pixel_values"][0], np.float32)


def _check_template(template: str, processor: Any) -> str:
  if template == "vicuna_v1":
    return VICUNA_V1
  if template == "chat":
    if not (getattr(processor, "chat_template", None) or processor.tokenizer.chat_template):
      raise UserError("the checkpoint has no chat template; use --prompt_template=vicuna_v1 or a literal one")
    return template
  if template.count(IMAGE_TAG) != 1 or template.count("{question}") != 1:
    raise UserError(
      f"--prompt_template must be vicuna_v1, chat, or a text with one {IMAGE_TAG} and one {{question}}, "
      f"not {template!r}"
    )
  return template.replace("\\n", "\n")


FAMILY = Family("llava", config, complete, load_processor, LlavaProcessor)
