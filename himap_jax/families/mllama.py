"""Llama-3.2-Vision: pictures of up to four tiles, read by cross-attention layers of a LLaMA 3.1 decoder."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image

from himap_jax.errors import UserError, check_supported
from himap_jax.families import files
from himap_jax.families.examples import blank, expand_across, picture_of, refuse_limit
from himap_jax.families.family import Family, Question, View
from himap_jax.families.prompts import (
  IMAGE_TAG,
  answer_text,
  chat_prompt,
  fill,
  literal_template,
  refuse_tokens,
)
from himap_jax.families.text import check_cross_layers, cross_text_config
from himap_jax.inputs import Example, Images, ImageSize
from himap_jax.model.config import LinearConfig, ModelConfig, TilingConfig, VisionConfig
from himap_jax.model.linear import ACTIVATIONS

IMAGE_TOKEN = "<|image|>"
NUM_EXTRA_EMBEDDINGS = 8


def config(fields: dict[str, Any], where: str) -> ModelConfig:
  """The sizes described by an mllama `config.json`; absent fields take transformers' defaults.

  Raises:
    UserError: unreadable fields, cross-attention layers that the decoder lacks, or sizes that contradict each other.
  """
  hf = _read(fields, where)
  check_supported(hf.vision_config.hidden_act, ACTIVATIONS, where=where, what="activation")
  # transformers never ties the head
  text = cross_text_config(hf.text_config, where, tied=False, num_extra_embeddings=NUM_EXTRA_EMBEDDINGS)
  return ModelConfig(_vision(hf.vision_config, where), LinearConfig(use_bias=True), text, hf.image_token_id)


def _read(fields: dict[str, Any], where: str) -> Any:
  check_cross_layers(fields.get("text_config") or {}, where)
  return files.read_config("MllamaConfig", fields, where)


def _vision(hf: Any, where: str) -> VisionConfig:
  inner, depth, ratios = hf.intermediate_layers_indices, hf.num_hidden_layers, hf.supported_aspect_ratios
  width = hf.hidden_size * (1 + len(inner))
  for name, value, is_valid, needed in (
    ("image_size", hf.image_size, isinstance(hf.image_size, int), "one number"),
    ("patch_size", hf.patch_size, isinstance(hf.patch_size, int), "one number"),
    ("intermediate_layers_indices", inner, all(0 <= layer < depth for layer in inner), f"layers from 0 to {depth - 1}"),
    ("vision_output_dim", hf.vision_output_dim, hf.vision_output_dim == width, f"{width}, from the other sizes"),
    (
      "supported_aspect_ratios",
      ratios,
      all(len(ratio) == 2 and 1 <= ratio[0] * ratio[1] <= hf.max_num_tiles for ratio in ratios),
      f"pairs of at most max_num_tiles ({hf.max_num_tiles}) tiles",
    ),
  ):
    if not is_valid:
      raise UserError(f"{where}: {name} is {value}; needed: {needed}")
  num_layers = depth + hf.num_global_layers
  return VisionConfig(
    model_type=hf.model_type,
    hidden_size=hf.hidden_size,
    intermediate_size=hf.intermediate_size,
    num_hidden_layers=num_layers,
    num_attention_heads=hf.attention_heads,
    image_size=hf.image_size,
    patch_size=hf.patch_size,
    hidden_act=hf.hidden_act,
    layer_norm_eps=hf.norm_eps,
    feature_layers=(*(layer + 1 for layer in inner), num_layers),
    select_strategy="full",
    has_class_token=True,
    patch_bias=False,
    qkv_bias=False,
    tiling=TilingConfig(hf.max_num_tiles, tuple(map(tuple, ratios)), hf.num_global_layers),
  )


def complete(fields: dict[str, Any]) -> dict[str, Any]:
  """All fields of `config.json`, with transformers' defaults for absent ones."""
  return files.complete_fields(_read(fields, "config.json"))


def load_processor(directory: pathlib.Path) -> files.ModelFiles:
  """Loads the tokenizer and the image processor; raises `UserError` if that fails."""
  return files.load(directory, "MllamaImageProcessorPil")


class MllamaProcessor:
  """Prepares prompts for one model; see `family.Processor`.

  A picture always has `max_num_tiles` tiles, those of padding included, since the tower reads these. The image tokens of
  a tile are its class token and its patches, row by row. They follow the `<|image|>` of their picture, which is text,
  and have its position.
  """

  def __init__(
    self, own: files.ModelFiles, config: ModelConfig, template: str = "chat", max_image_tokens: int | None = None
  ):
    """Checks the template, `chat` or a text with `<image>` and `{question}`, and the image processor."""
    from transformers.models.mllama.image_processing_pil_mllama import get_all_supported_aspect_ratios

    self._files, self._config = own, config
    self._is_chat = template == "chat"
    if self._is_chat and not own.chat_template:
      raise UserError("the checkpoint has no chat template; use a literal --prompt_template")
    self._template = "" if self._is_chat else literal_template(template, "chat")
    vision, images = config.vision, own.image_processor
    side = images.size["height"]
    if side != vision.image_size or vision.tiling.arrangements != tuple(
      get_all_supported_aspect_ratios(images.max_image_tiles)
    ):
      raise UserError(
        f"the checkpoint's image processor makes up to {images.max_image_tiles} tiles of {side} pixels, and config.json "
        f"describes {vision.tiling.max_num_tiles} of {vision.image_size} in arrangements {vision.tiling.arrangements}"
      )
    self._side, self._tiles = side // vision.patch_size, vision.tiles_per_picture
    self.image_shape = (side, side)
    self.patch_grid = (self._side, self._side)
    self.num_image_tokens = config.num_image_tokens(side, side)
    refuse_limit(max_image_tokens, self.num_image_tokens)
    self.blank = blank(Images(np.zeros((0, 3, side, side), np.float32), np.zeros((0, 3), np.int32)))

  def image_size(self, sizes: Sequence[tuple[int, int]]) -> ImageSize:
    return ImageSize(len(sizes) * self._tiles, len(sizes) * self.num_image_tokens)

  def prepare(self, images: Sequence[Image.Image], question: Question) -> Example:
    from transformers.models.mllama.processing_mllama import build_string_from_input

    tokenizer = self._files.tokenizer
    text = build_string_from_input(self.prompt(question, len(images)), tokenizer.bos_token, IMAGE_TOKEN)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pixels, places = [self.blank.images.pixels], [self.blank.images.coordinates]
    for number, image in enumerate(images):
      made = self._files.image_processor(image, return_tensors="np")
      rows, columns = self._config.vision.tiling.arrangements[made["aspect_ratio_ids"].item() - 1]
      own = np.full((self._tiles, 3), -1, np.int32)
      own[: rows * columns] = [(number, row, column) for row in range(rows) for column in range(columns)]
      pixels.append(np.asarray(made["pixel_values"][0, 0], np.float32))
      places.append(own)
    tiles = Images(np.concatenate(pixels), np.concatenate(places))
    return expand_across(ids, self._config.image_token_id, self.num_image_tokens, tiles, len(images))

  def prompt(self, question: Question, num_pictures: int = 1) -> str:
    refuse_tokens(question, [IMAGE_TOKEN])
    if not self._is_chat:
      return fill(self._template, question, num_pictures).replace(IMAGE_TAG, IMAGE_TOKEN)
    return chat_prompt(self._files.apply_chat_template, question, num_pictures)

  def decode(self, tokens: Sequence[int]) -> str:
    return answer_text(self._files.tokenizer, tokens)

  def views(self, example: Example) -> list[View]:
    views = []
    for number in range(example.num_images):
      own = example.images.coordinates[:, 0] == number
      rows, columns = example.images.coordinates[own, 1:].max(axis=0) + 1
      pixels = example.images.pixels[own].reshape(rows, columns, 3, *self.image_shape).transpose(2, 0, 3, 1, 4)
      pixels = pixels.reshape(3, rows * self.image_shape[0], columns * self.image_shape[1])
      tokens = np.flatnonzero(own)[:, None] * (self._side**2 + 1) + 1 + np.arange(self._side**2)[None]
      tokens = tokens.reshape(rows, columns, self._side, self._side).transpose(0, 2, 1, 3)
      picture = picture_of(self._files.image_processor, pixels, *pixels.shape[1:])
      views.append(View(picture, tokens.reshape(rows * self._side, columns * self._side)))
    return views

  def places(self, example: Example) -> Int[np.ndarray, "N 4"]:
    """As in `family.Processor`: class tokens have no row and column, and tokens of padding have no place."""
    row, column = (axis.ravel() for axis in np.indices((self._side, self._side)))
    inside = np.concatenate([[[-1, -1]], np.stack([row, column], axis=1)])
    places = np.full((len(example.images.pixels), len(inside), 4), -1)
    picture = example.images.coordinates[:, 0]
    places[..., 0], places[..., 1] = picture[:, None], np.arange(len(picture))[:, None] % self._tiles
    places[..., 2:] = inside[None]
    places[picture < 0] = -1
    return places.reshape(-1, 4)


FAMILIES = (
  Family("mllama", config, complete, load_processor, MllamaProcessor, image_token=lambda tokenizer: IMAGE_TOKEN),
)
