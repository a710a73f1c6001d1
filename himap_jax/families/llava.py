"""LLaVA: a CLIP, SigLIP, DINOv2 or InternViT tower, a two-layer connector and a decoder."""

import copy
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from himap_jax.errors import UserError, check_supported
from himap_jax.families import files, templates
from himap_jax.families.examples import (
  MAX_PIXELS,
  blank,
  check_aspect_ratio,
  expand,
  pixels_of,
  places_in,
  refuse_limit,
  tiles_of,
  views_of_patches,
)
from himap_jax.families.family import Family, Question, View
from himap_jax.families.prompts import (
  IMAGE_TAG,
  answer_text,
  chat_prompt,
  fill,
  literal_template,
  messages_of,
  prompt_ids,
)
from himap_jax.families.text import check_text_model, text_config
from himap_jax.inputs import Example, Images, ImageSize
from himap_jax.model.config import ConnectorConfig, ModelConfig, VisionConfig
from himap_jax.model.linear import ACTIVATIONS

VISION_MODELS = ("clip_vision_model", "siglip_vision_model", "dinov2", "internvl_vision")
VICUNA_V1 = (
  "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
  "and polite answers to the user's questions. USER: <image>\n{question} ASSISTANT:"
)
PIXEL_SETTINGS = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_convert_rgb")
PIXEL_SETTINGS += ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")


def config(
  fields: dict[str, Any], where: str, class_name: str = "LlavaConfig", towers: Sequence[str] = VISION_MODELS
) -> ModelConfig:
  """The sizes described by a LLaVA `config.json`; absent fields take transformers' defaults.

  Args:
    class_name: transformers' configuration of LLaVA or of a model with the same fields.
    towers: supported model types of the tower.

  Raises:
    UserError: the tower, decoder, activation or RoPE scaling is not supported; the message names those that are.
  """
  vision_type = (fields.get("vision_config") or {}).get("model_type", towers[0])
  check_supported(vision_type, towers, where=where, what="vision tower")
  check_text_model(fields.get("text_config") or {}, where)
  complete = files.read_config(class_name, fields, where)
  connector = ConnectorConfig(complete.projector_hidden_act, complete.multimodal_projector_bias)
  vision = vision_config(complete, where)
  text = text_config(complete.text_config, where, tied=fields.get("tie_word_embeddings"))
  for name in (vision.hidden_act, connector.hidden_act):
    check_supported(name, ACTIVATIONS, where=where, what="activation")
  return ModelConfig(vision, connector, text, complete.image_token_id)


def vision_config(llava: Any, where: str) -> VisionConfig:
  """The tower of a config of transformers with LLaVA's fields; raises `UserError` if it is not supported."""
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
    image_size=_side(hf.image_size, where),
    patch_size=_side(hf.patch_size, where),
    hidden_act=hf.hidden_act,
    layer_norm_eps=hf.layer_norm_eps,
    feature_layers=tuple(layer % (depth + 1) for layer in layers),
    select_strategy=llava.vision_feature_select_strategy,
    has_class_token=hf.model_type != "siglip_vision_model",
    patch_bias=hf.model_type != "clip_vision_model",
  )
  if hf.model_type == "internvl_vision":
    if not hf.use_absolute_position_embeddings:
      raise UserError(f"{where}: InternViT without position embeddings is not supported")
    options = dict(qkv_bias=hf.attention_bias, norm_type=hf.norm_type, qk_norm=hf.use_qk_norm)
    return VisionConfig(intermediate_size=hf.intermediate_size, **common, **options)
  if hf.model_type != "dinov2":
    return VisionConfig(intermediate_size=hf.intermediate_size, **common)
  if hf.use_swiglu_ffn:
    raise UserError(f"{where}: DINOv2 with a SwiGLU feed-forward (use_swiglu_ffn) is not supported")
  return VisionConfig(intermediate_size=int(hf.hidden_size * hf.mlp_ratio), qkv_bias=hf.qkv_bias, **common)


def _side(size: int | Sequence[int], where: str) -> int:
  sides = {size} if isinstance(size, int) else set(size)
  if len(sides) != 1:
    raise UserError(f"{where}: a tower for pictures or patches that are not square, {size}, is not supported")
  return sides.pop()


def complete(fields: dict[str, Any], where: str = "config.json", *, class_name: str = "LlavaConfig") -> dict[str, Any]:
  """All fields of `config.json`, with transformers' defaults for absent ones."""
  return files.complete_fields(files.read_config(class_name, fields, where), where)


def load_processor(directory: pathlib.Path) -> Any:
  """Loads transformers' processor (tokenizer, image processor, chat template); raises `UserError` if that fails."""
  import transformers  # slow to import

  with files.unusable(directory):
    processor = transformers.AutoProcessor.from_pretrained(str(directory), local_files_only=True)
    if not isinstance(processor, transformers.ProcessorMixin):  # it takes what it finds
      raise UserError(f"{directory}: the files of its processor are missing or damaged; only its tokenizer was found")
    return processor


def pad_to_squares(processor: Any) -> Any:
  """Transformers' processor, but with pictures padded to squares with their mean colour, as LLaVA-1.5 was trained."""
  import transformers  # slow to import

  own, images = copy.copy(processor), processor.image_processor
  settings = {name: value for name, value in images.to_dict().items() if name in PIXEL_SETTINGS}
  own.image_processor = transformers.LlavaImageProcessorPil(**settings, do_pad=True)
  return own


class LlavaPrompts:
  """Texts of prompts and answers, and their token ids."""

  def __init__(self, processor: Any, template: str):
    """Checks the template.

    Args:
      processor: its tokenizer and `chat_template` are used.
      template: `vicuna_v1`, `chat` (the checkpoint's own), or a text with `<image>` and `{question}`.

    Raises:
      UserError: the template is unusable.
    """
    self._processor = processor
    self._template = _check_template(template, processor)

  def prompt(self, question: Question, num_pictures: int = 1) -> str:
    if self._template != "chat":
      return fill(self._template, question, num_pictures)
    apply = self._apply_chat_template
    if not isinstance(question, str) or IMAGE_TAG not in question:
      return chat_prompt(apply, question, num_pictures)
    # As text, it stays where it is: a template may move parts that are pictures to the front.
    (message,) = messages_of(question, num_pictures)
    return templates.filled(apply, [{"role": message.role, "content": [{"type": "text", "text": message.text}]}])

  def _apply_chat_template(self, conversation: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """By the tokenizer, all of whose options are the template's; transformers' processor has others for pictures."""
    template = self._processor.chat_template
    if isinstance(template, Mapping):
      template = template[templates.DEFAULT]
    apply = self._processor.tokenizer.apply_chat_template
    return apply(list(conversation), chat_template=template, tokenize=False, **options)

  def ids(self, text: str) -> list[int]:
    """Token ids of a prompt, with one beginning of sequence if the tokenizer has one."""
    return prompt_ids(self._processor.tokenizer, text)

  def decode(self, tokens: Sequence[int]) -> str:
    return answer_text(self._processor.tokenizer, tokens)


class LlavaProcessor(LlavaPrompts):
  """Prepares prompts for one model; see `family.Processor`."""

  def __init__(self, processor: Any, config: ModelConfig, template: str = "chat", max_image_tokens: int | None = None):
    """Checks the template and the image processor; raises `UserError` if its pictures differ in size, too."""
    super().__init__(processor, template)
    self._config = config
    wide, tall = (pixels_of(processor.image_processor, [Image.new("RGB", size)])[0] for size in ((64, 48), (48, 64)))
    if tall.shape != wide.shape:
      raise UserError("the checkpoint's image processor returns pictures of different sizes; a batch needs one size")
    self.image_shape = wide.shape[1:]
    self.patch_grid = tuple(side // config.vision.patch_size for side in self.image_shape)
    self.num_image_tokens = config.num_image_tokens(*self.image_shape)
    refuse_limit(max_image_tokens, self.num_image_tokens)
    self.blank = blank(Images(np.zeros((0, *wide.shape), np.float32)))

  def image_size(self, sizes: Sequence[tuple[int, int]]) -> ImageSize:
    return ImageSize(len(sizes), len(sizes) * self.num_image_tokens)

  def prepare(self, images: Sequence[Image.Image], question: Question) -> Example:
    ids = self.ids(self.prompt(question, len(images)))
    tiles = Images(self.pixels(images))
    return expand(ids, self._config.image_token_id, [self.num_image_tokens] * len(images), tiles)

  def pixels(self, images: Sequence[Image.Image]) -> Float[np.ndarray, "P 3 h w"]:
    """The preprocessed pictures; raises `UserError` for one that would exhaust memory."""
    for image in images:
      self._check_size(image)
    return tiles_of(self._processor.image_processor, images, self.blank)

  def views(self, example: Example) -> list[View]:
    return views_of_patches(self._processor.image_processor, example, self.patch_grid, self._config.vision.patch_size)

  def places(self, example: Example) -> Int[np.ndarray, "N 4"]:
    return places_in(self.views(example), example.num_image_tokens)

  def _check_size(self, image: Image.Image) -> None:
    """Refuses pictures that would exhaust memory when resized or padded to a square."""
    check_aspect_ratio(*image.size)
    if getattr(self._processor.image_processor, "do_pad", False):
      check_square(image)


def check_square(image: Image.Image) -> None:
  """Refuses pictures that would exhaust memory when padded to a square."""
  if max(image.size) ** 2 > MAX_PIXELS:
    raise UserError(
      f"the picture has {image.width} x {image.height} pixels; padded to a square it is above the limit of "
      f"{MAX_PIXELS:,}"
    )


def _check_template(template: str, processor: Any) -> str:
  if template == "vicuna_v1":
    return VICUNA_V1
  if template == "chat":
    if not (getattr(processor, "chat_template", None) or processor.tokenizer.chat_template):
      raise UserError("the checkpoint has no chat template; use --prompt_template=vicuna_v1 or a literal one")
    return template
  return literal_template(template, "vicuna_v1", "chat")


FAMILIES = (Family("llava", config, complete, load_processor, LlavaProcessor, pad=pad_to_squares),)
