"""Gemma 3: a SigLIP tower whose patches are averaged, and a decoder in which image tokens see each other
(arXiv 2503.19786)."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image

from himap_jax.errors import UserError, check_supported
from himap_jax.families.examples import blank, expand, places_in, refuse_limit, tiles_of, views_of_patches
from himap_jax.families.family import Family, Question, View
from himap_jax.families.files import PromptFiles, complete_fields, read_config, unusable
from himap_jax.families.prompts import (
  IMAGE_TAG,
  answer_text,
  chat_prompt,
  fill,
  literal_template,
  prompt_ids,
  refuse_tokens,
)
from himap_jax.families.text import text_config
from himap_jax.inputs import Example, Images, ImageSize
from himap_jax.model.config import ModelConfig, NormLinearConfig, VisionConfig
from himap_jax.model.linear import ACTIVATIONS

LAYER_TYPES = ("sliding_attention", "full_attention")
SPECIAL_TOKENS = ("boi_token", "eoi_token", "image_token")  # as the tokenizer calls them


def config(fields: dict[str, Any], where: str) -> ModelConfig:
  """The sizes described by a Gemma 3 `config.json`; absent fields take transformers' defaults.

  Raises:
    UserError: another tower or decoder, an option that no published Gemma 3 has, image tokens that form no square, or
      unusable types of layers.
  """
  vision_type = (fields.get("vision_config") or {}).get("model_type", "siglip_vision_model")
  check_supported(vision_type, ("siglip_vision_model",), where=where, what="vision tower")
  text_fields = fields.get("text_config") or {}
  check_supported(text_fields.get("model_type", "gemma3_text"), ("gemma3_text",), where=where, what="language model")
  _check_layers(text_fields, where)
  full = read_config("Gemma3Config", fields, where)
  text = text_config(full.text_config, where, tied=full.tie_word_embeddings)
  vision = _vision(full.vision_config, fields.get("mm_tokens_per_image"), where)
  connector = NormLinearConfig(vision.layer_norm_eps)
  return ModelConfig(vision, connector, dataclasses.replace(text, is_bidirectional=True), full.image_token_id)


def _check_layers(text: Mapping[str, Any], where: str) -> None:
  types, window = (text.get(name) for name in ("layer_types", "sliding_window"))
  if types is not None:
    known = isinstance(types, list) and all(kind in LAYER_TYPES for kind in types)
    if not known or len(types) != text.get("num_hidden_layers", len(types)):
      raise UserError(f"{where}: layer_types must name {' or '.join(LAYER_TYPES)} for each of num_hidden_layers layers")
  if "sliding_window" in text and window is None:
    raise UserError(f"{where}: sliding_window is {window!r}, not a number of tokens")


def _vision(hf: Any, num_tokens: Any, where: str) -> VisionConfig:
  check_supported(hf.hidden_act, ACTIVATIONS, where=where, what="activation")
  if num_tokens is None:
    raise UserError(f"{where}: no mm_tokens_per_image, the number of image tokens of a picture")
  if type(num_tokens) is not int or num_tokens < 1 or math.isqrt(num_tokens) ** 2 != num_tokens:
    raise UserError(f"{where}: mm_tokens_per_image is {num_tokens!r}, not a square number")
  patches, tokens = hf.image_size // hf.patch_size, math.isqrt(num_tokens)
  if patches % tokens:
    raise UserError(
      f"{where}: mm_tokens_per_image is {num_tokens}, but {patches} x {patches} patches cannot be averaged to {tokens} x "
      f"{tokens} image tokens"
    )
  return VisionConfig(
    model_type="siglip_vision_model",
    hidden_size=hf.hidden_size,
    intermediate_size=hf.intermediate_size,
    num_hidden_layers=hf.num_hidden_layers,
    num_attention_heads=hf.num_attention_heads,
    image_size=hf.image_size,
    patch_size=hf.patch_size,
    hidden_act=hf.hidden_act,
    layer_norm_eps=hf.layer_norm_eps,
    feature_layers=(hf.num_hidden_layers,),
    select_strategy="full",
    has_class_token=False,
    final_norm=True,
    pool=patches // tokens,
  )


def complete(fields: dict[str, Any]) -> dict[str, Any]:
  """All fields of `config.json`, with transformers' current defaults for absent ones."""
  return complete_fields(read_config("Gemma3Config", fields))


def load_processor(directory: pathlib.Path) -> PromptFiles:
  """Loads tokenizer and image processor; raises `UserError` if that fails, or for crops of pictures."""
  import transformers  # slow to import

  with unusable(directory):
    files = PromptFiles(
      transformers.AutoTokenizer.from_pretrained(str(directory), local_files_only=True),
      transformers.Gemma3ImageProcessorPil.from_pretrained(str(directory), local_files_only=True),
    )
  if files.image_processor.do_pan_and_scan:
    raise UserError(
      f"{directory}: its image processor adds crops of long pictures (do_pan_and_scan), which is not supported; "
      "published Gemma 3 has it off"
    )
  missing = [name for name in SPECIAL_TOKENS if not getattr(files.tokenizer, name, None)]
  if missing:
    raise UserError(
      f"{directory}: the tokenizer has no {', '.join(missing)}; it is not that of a Gemma 3 with pictures"
    )
  return files


class GemmaProcessor:
  """Prepares prompts for one model; see `family.Processor`."""

  def __init__(
    self, files: PromptFiles, config: ModelConfig, template: str = "chat", max_image_tokens: int | None = None
  ):
    """Checks the template, `chat` or a text with `<image>` and `{question}`, and the size of pictures."""
    self._tokenizer, self._image_processor, self._config = files.tokenizer, files.image_processor, config
    self._is_chat = template == "chat"
    if self._is_chat and not files.tokenizer.chat_template:
      raise UserError(
        "the checkpoint has no chat template; use a literal --prompt_template with <image> and {question}"
      )
    self._template = "" if self._is_chat else literal_template(template, "chat")
    self._special = {name: getattr(files.tokenizer, name) for name in SPECIAL_TOKENS}
    size, side = files.image_processor.size, config.vision.image_size
    self.image_shape = (size["height"], size["width"])
    if self.image_shape != (side, side):
      raise UserError(
        f"the checkpoint's image processor makes pictures of {size['width']} x {size['height']} pixels, but its tower "
        f"reads {side} x {side}"
      )
    self._patch_size = config.vision.patch_size * config.vision.pool  # of what becomes an image token
    self.patch_grid = tuple(length // self._patch_size for length in self.image_shape)
    self.num_image_tokens = config.num_image_tokens(*self.image_shape)
    refuse_limit(max_image_tokens, self.num_image_tokens)
    self.blank = blank(Images(np.zeros((0, 3, *self.image_shape), np.float32)))

  def image_size(self, sizes: Sequence[tuple[int, int]]) -> ImageSize:
    return ImageSize(len(sizes), len(sizes) * self.num_image_tokens)

  def prepare(self, images: Sequence[Image.Image], question: Question) -> Example:
    refuse_tokens(question, list(self._special.values()))
    start, end, image = (self._special[name] for name in SPECIAL_TOKENS)
    text = self.prompt(question, len(images)).replace(start, f"\n\n{start}{image}{end}\n\n")
    ids = prompt_ids(self._tokenizer, text)
    pixels = tiles_of(self._image_processor, images, self.blank)
    return expand(ids, self._config.image_token_id, [self.num_image_tokens] * len(images), Images(pixels))

  def prompt(self, question: Question, num_pictures: int = 1) -> str:
    if not self._is_chat:
      return fill(self._template, question, num_pictures).replace(IMAGE_TAG, self._special["boi_token"])
    render = functools.partial(self._tokenizer.apply_chat_template, tokenize=False)
    return chat_prompt(render, question, num_pictures)

  def decode(self, tokens: Sequence[int]) -> str:
    return answer_text(self._tokenizer, tokens)

  def views(self, example: Example) -> list[View]:
    return views_of_patches(self._image_processor, example, self.patch_grid, self._patch_size)

  def places(self, example: Example) -> Int[np.ndarray, "N 4"]:
    return places_in(self.views(example), example.num_image_tokens)


FAMILIES = (
  Family(
    "gemma3",
    config,
    complete,
    load_processor,
    GemmaProcessor,
    image_token=lambda tokenizer: tokenizer.image_token,
  ),
)
