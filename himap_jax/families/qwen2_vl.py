"""Qwen2-VL (arXiv 2409.12191), Qwen2.5-VL (arXiv 2502.13923) and Qwen3-VL, for pictures; videos are not supported.

A picture keeps its aspect ratio: it is resized to whole squares of patches, and each square is an image token.
"""

import copy
import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image

from checkpoints_convert.json_files import read_json
from himap_jax.errors import UserError, check_supported
from himap_jax.families.examples import blank, check_aspect_ratio, expand, picture_of, places_in
from himap_jax.families.family import Family, Question, View
from himap_jax.families.files import PromptFiles, complete_fields, read_config, unusable
from himap_jax.families.prompts import (
  IMAGE_TAG,
  answer_text,
  chat_prompt,
  fill,
  literal_template,
  refuse_tokens,
)
from himap_jax.families.text import TEXT_MODELS, text_config
from himap_jax.inputs import Example, Images, ImageSize
from himap_jax.model.config import MergerConfig, ModelConfig, PatchVisionConfig, TextConfig
from himap_jax.model.linear import ACTIVATIONS

# transformers' configuration classes, and what they do not tell.
CONFIGS = {"qwen2_vl": "Qwen2VLConfig", "qwen2_5_vl": "Qwen2_5_VLConfig", "qwen3_vl": "Qwen3VLConfig"}
SECTIONS = {"qwen2_vl": (16, 24, 24), "qwen2_5_vl": (16, 24, 24), "qwen3_vl": (24, 20, 20)}
EPSILON = 1e-6
PLACEHOLDER = "<|image_pad|>"
PICTURE = f"<|vision_start|>{PLACEHOLDER}<|vision_end|>"


def config(fields: dict[str, Any], where: str) -> ModelConfig:
  """The sizes described by a `config.json` of one of the families; absent fields take transformers' defaults.

  Raises:
    UserError: the activation, RoPE scaling, windows or sections are not supported; the message says what is.
  """
  hf = read_config(CONFIGS[fields["model_type"]], fields, where)
  family, given = fields["model_type"], (fields.get("vision_config") or {}).get("model_type")
  check_supported(given or family, (family, f"{family}_vision"), where=where, what="vision tower")
  vision, text = _vision(hf.vision_config, f"{family}_vision", where), _text(hf, where)
  width = getattr(hf.vision_config, "out_hidden_size", hf.vision_config.hidden_size)
  if width != text.hidden_size:
    raise UserError(f"{where}: the vision tower's output has width {width}, but the decoder has {text.hidden_size}")
  connector = MergerConfig(vision.merge_size**2, vision.norm_type, EPSILON)
  return ModelConfig(vision, connector, text, hf.image_token_id)


def _vision(hf: Any, kind: str, where: str) -> PatchVisionConfig:
  check_supported(hf.hidden_act, ACTIVATIONS, where=where, what="activation")
  patch, square = hf.patch_size, hf.patch_size * hf.spatial_merge_size
  common = dict(
    model_type=kind,
    num_hidden_layers=hf.depth,
    num_attention_heads=hf.num_heads,
    patch_size=patch,
    hidden_act=hf.hidden_act,
    layer_norm_eps=EPSILON,
    feature_layers=(hf.depth,),
    select_strategy="full",
    has_class_token=False,
    merge_size=hf.spatial_merge_size,
    rope_theta=hf.rope_parameters["rope_theta"],
  )
  width = hf.embed_dim if kind == "qwen2_vl_vision" else hf.hidden_size
  if width % (4 * hf.num_heads):
    raise UserError(f"{where}: a tower of width {width} has no {hf.num_heads} heads whose width is a multiple of four")
  if kind == "qwen2_vl_vision":
    sizes = dict(hidden_size=width, intermediate_size=int(width * hf.mlp_ratio), image_size=square)
    return PatchVisionConfig(**common, **sizes, patch_bias=False)
  sizes = dict(hidden_size=width, intermediate_size=hf.intermediate_size)
  if kind == "qwen2_5_vl_vision":
    if hf.window_size < square:
      raise UserError(f"{where}: window_size is {hf.window_size}, less than a square of patches, {square}")
    window, layers = hf.window_size // square * hf.spatial_merge_size, tuple(hf.fullatt_block_indexes)
    if not set(layers) <= set(range(hf.depth)):
      raise UserError(f"{where}: fullatt_block_indexes {list(layers)} are not layers of {hf.depth}")
    options = dict(window_size=window, full_attention_layers=layers, is_gated=True)
    return PatchVisionConfig(**common, **sizes, **options, image_size=square, patch_bias=False, norm_type="rms_norm")
  side, layers = round(hf.num_position_embeddings**0.5), tuple(hf.deepstack_visual_indexes)
  if side**2 != hf.num_position_embeddings:
    raise UserError(f"{where}: num_position_embeddings is {hf.num_position_embeddings}, not a square number")
  if list(layers) != sorted(set(layers) & set(range(hf.depth))):
    raise UserError(f"{where}: deepstack_visual_indexes {list(layers)} are not ascending layers of {hf.depth}")
  options = dict(deepstack_layers=layers, has_position_embedding=True)
  return PatchVisionConfig(**common, **sizes, **options, image_size=side * patch)


def _text(hf: Any, where: str) -> TextConfig:
  own = f"{hf.model_type}_text"
  check_supported(hf.text_config.model_type, (hf.model_type, own), where=where, what="language model")
  options = TEXT_MODELS[own](hf.text_config)
  text = text_config(hf.text_config, where, tied=hf.tie_word_embeddings, options=options)
  sections = tuple(hf.text_config.rope_parameters.get("mrope_section", SECTIONS[hf.model_type]))
  if len(sections) != 3 or 2 * sum(sections) != text.rotary_dim:
    raise UserError(
      f"{where}: mrope_section is {list(sections)}; three sections must share the {text.rotary_dim // 2} frequencies"
    )
  rope = dataclasses.replace(text.rope, sections=sections, interleaved=hf.model_type == "qwen3_vl")
  return dataclasses.replace(text, rope=rope)


def complete(fields: dict[str, Any]) -> dict[str, Any]:
  """All fields of `config.json`, with transformers' defaults for absent ones."""
  return complete_fields(read_config(CONFIGS[fields["model_type"]], fields))


def load_processor(directory: pathlib.Path) -> PromptFiles:
  """Loads the tokenizer with its chat template, and the image processor; raises `UserError` for unusable files."""
  import transformers  # slow to import
  from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

  with unusable(directory):
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    images = Qwen2VLImageProcessorPil.from_pretrained(str(directory), local_files_only=True)
  if (own := directory / "chat_template.json").exists():  # of transformers' processor, which prefers it
    tokenizer.chat_template = read_json(own).get("chat_template", tokenizer.chat_template)
  return PromptFiles(tokenizer, images)


def grid_coordinates(rows: int, columns: int, merge: int) -> Int[np.ndarray, "P 2"]:
  """Row and column of a picture's patches, those of a square of `merge` × `merge` after each other."""
  places = np.indices((rows, columns), np.int32).reshape(2, rows // merge, merge, columns // merge, merge)
  return places.transpose(1, 3, 2, 4, 0).reshape(-1, 2)


def positions_of(image_id: Int[np.ndarray, "S"], grids: Sequence[tuple[int, int]]) -> Int[np.ndarray, "S 3"]:
  """Rotary positions along time, rows and columns, as transformers' `get_rope_index`.

  The text after a picture goes on from its larger side; `grids` are rows and columns of image tokens.
  """
  positions, slot, start = np.zeros((len(image_id), 3), np.int32), 0, 0
  for picture, (rows, columns) in enumerate(grids):
    first = int(np.argmax(image_id == picture))
    positions[slot:first] = np.arange(start, start + first - slot)[:, None]
    start += first - slot
    slot = first + rows * columns
    positions[first:slot, 0] = start
    positions[first:slot, 1:] = start + np.indices((rows, columns)).reshape(2, -1).T
    start += max(rows, columns)
  positions[slot:] = np.arange(start, start + len(image_id) - slot)[:, None]
  return positions


class Qwen2VLProcessor:
  """Prepares prompts for one model; see `family.Processor`."""

  image_shape = patch_grid = num_image_tokens = None

  def __init__(
    self, files: PromptFiles, config: ModelConfig, template: str = "chat", max_image_tokens: int | None = None
  ):
    """Checks the image processor and the template: `chat` (the checkpoint's own), or a literal one.

    `max_image_tokens` lowers the image processor's limit of pixels.
    """
    self._tokenizer, self._images, self._config = files.tokenizer, files.image_processor, config
    self._is_chat = template == "chat"
    if self._is_chat and not self._tokenizer.chat_template:
      raise UserError("the checkpoint has no chat template; use a literal --prompt_template")
    self._template = "" if self._is_chat else literal_template(template, "chat")
    images, vision = self._images, config.vision
    if (images.patch_size, images.merge_size) != (vision.patch_size, vision.merge_size):
      raise UserError(
        f"the image processor makes patches of {images.patch_size} px in squares of {images.merge_size}, but the model "
        f"has {vision.patch_size} and {vision.merge_size}; preprocessor_config.json and config.json disagree"
      )
    if not images.do_resize or None in (images.size.shortest_edge, images.size.longest_edge):
      raise UserError("preprocessor_config.json needs do_resize, and min_pixels and max_pixels")
    if max_image_tokens is not None:
      self._images = _limited(images, max_image_tokens * (vision.patch_size * vision.merge_size) ** 2)
    no_patches = np.zeros((0, 3 * vision.patch_size**2), np.float32)
    self.blank = blank(Images(no_patches, np.zeros((0, 3), np.int32)), 3)

  def image_size(self, sizes: Sequence[tuple[int, int]]) -> ImageSize:
    num_patches = sum(self._num_patches(width, height) for width, height in sizes)
    return ImageSize(num_patches, num_patches // self._config.vision.merge_size**2)

  def prepare(self, images: Sequence[Image.Image], question: Question) -> Example:
    refuse_tokens(question, [PLACEHOLDER])
    ids = self._tokenizer(self.prompt(question, len(images)))["input_ids"]
    merge, patches, coordinates, grids = self._config.vision.merge_size, [], [], []
    for number, image in enumerate(images):
      self._num_patches(*image.size)
      made = self._images(images=[image], return_tensors="np")
      frames = made["pixel_values"].reshape(len(made["pixel_values"]), 3, self._images.temporal_patch_size, -1)
      patches.append(frames[:, :, 0].reshape(len(frames), -1).astype(np.float32))
      _, rows, columns = made["image_grid_thw"][0].tolist()
      grids.append((rows // merge, columns // merge))
      coordinates.append(np.insert(grid_coordinates(rows, columns, merge), 0, number, axis=1))
    own = self.blank.images
    own = Images(np.concatenate([own.pixels, *patches]), np.concatenate([own.coordinates, *coordinates]))
    counts = [rows * columns for rows, columns in grids]
    example = expand(ids, self._config.image_token_id, counts, own)
    return dataclasses.replace(example, positions=positions_of(example.image_id, grids))

  def prompt(self, question: Question, num_pictures: int = 1) -> str:
    if not self._is_chat:
      return fill(self._template, question, num_pictures).replace(IMAGE_TAG, PICTURE)
    render = functools.partial(self._tokenizer.apply_chat_template, tokenize=False)
    return chat_prompt(render, question, num_pictures)

  def decode(self, tokens: Sequence[int]) -> str:
    return answer_text(self._tokenizer, tokens)

  def views(self, example: Example) -> list[View]:
    merge, patch, views, first = self._config.vision.merge_size, self._config.vision.patch_size, [], 0
    for number in range(example.num_images):
      own = example.images.coordinates[:, 0] == number
      rows, columns = (example.images.coordinates[own, 1:].max(axis=0) + 1).tolist()
      squares = example.images.pixels[own].reshape(rows // merge, columns // merge, merge, merge, 3, patch, patch)
      pixels = squares.transpose(4, 0, 2, 5, 1, 3, 6).reshape(3, rows * patch, columns * patch)
      count = own.sum() // merge**2
      tokens = np.arange(first, first + count).reshape(rows // merge, columns // merge)
      views.append(View(picture_of(self._images, pixels, *pixels.shape[1:]), tokens))
      first += count
    return views

  def places(self, example: Example) -> Int[np.ndarray, "N 4"]:
    return places_in(self.views(example), example.num_image_tokens)

  def _num_patches(self, width: int, height: int) -> int:
    check_aspect_ratio(width, height)
    return self._images.get_number_of_image_patches(height, width)


def _limited(images: Any, max_pixels: int) -> Any:
  """The image processor with at most so many pixels."""
  longest = min(images.size.longest_edge, max_pixels)
  limited = copy.copy(images)
  limited.size = type(images.size)(shortest_edge=min(images.size.shortest_edge, longest), longest_edge=longest)
  return limited


FAMILIES = tuple(
  Family(name, config, complete, load_processor, Qwen2VLProcessor, image_token=lambda tokenizer: PLACEHOLDER)
  for name in CONFIGS
)
