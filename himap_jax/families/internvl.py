"""InternVL3 and InternVL3.5 in the Hugging Face layout: InternViT, a pixel shuffle, an MLP and a Qwen decoder.

A picture is cut into the grid of tiles nearest to its aspect ratio (Chen et al., arXiv 2404.16821), with a thumbnail
if there are several.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from himap_jax.errors import UserError, check_supported
from himap_jax.families import files
from himap_jax.families.family import Family
from himap_jax.families.llava import vision_config
from himap_jax.families.text import text_config
from himap_jax.families.tiles import Grid, TiledProcessor, Tiling, most_tiles
from himap_jax.model.config import ConnectorConfig, ModelConfig
from himap_jax.model.linear import ACTIVATIONS

TEXT_MODELS = ("qwen2", "qwen3", "llama")
CONNECTOR_EPSILON = 1e-5
START, END = "<img>", "</img>"
CONTEXT = "<IMG_CONTEXT>"  # unless the tokenizer has another


def config(fields: dict[str, Any], where: str) -> ModelConfig:
  """The sizes described by an InternVL `config.json`; absent fields take transformers' defaults.

  The head is tied only if `config.json` or its `text_config` says so: published checkpoints have one of their own.

  Raises:
    UserError: the tower, decoder, activation or pixel shuffle is not supported; the message says what is.
  """
  text_type = (fields.get("text_config") or {}).get("model_type", "qwen2")
  check_supported(text_type, TEXT_MODELS, where=where, what="language model")
  vision_type = (fields.get("vision_config") or {}).get("model_type", "internvl_vision")
  check_supported(vision_type, ("internvl_vision",), where=where, what="vision tower")
  hf = files.read_config("InternVLConfig", fields, where)
  layer, strategy, merge_size = hf.vision_feature_layer, hf.vision_feature_select_strategy, 1 / hf.downsample_ratio
  check_supported(strategy, ("default",), where=where, what="vision_feature_select_strategy")
  if not isinstance(layer, int):
    raise UserError(f"{where}: vision_feature_layer {layer} is not supported; supported: one layer")
  if merge_size % 1:
    raise UserError(f"{where}: downsample_ratio {hf.downsample_ratio} is not supported; supported: 1, 0.5, 0.25")
  vision = dataclasses.replace(
    vision_config(hf, where),
    final_norm=layer == -1 and not hf.vision_config.use_mean_pooling,
    merge_size=int(merge_size),
  )
  patches = vision.image_size // vision.patch_size
  if patches % vision.merge_size:
    raise UserError(
      f"{where}: downsample_ratio {hf.downsample_ratio} groups {vision.merge_size} by {vision.merge_size} patches, which "
      f"does not divide the {patches} patches of a tile's side"
    )
  connector = ConnectorConfig(hf.projector_hidden_act, use_bias=True, layer_norm_eps=CONNECTOR_EPSILON)
  for name in (vision.hidden_act, connector.hidden_act):
    check_supported(name, ACTIVATIONS, where=where, what="activation")
  text = text_config(hf.text_config, where, tied=fields.get("tie_word_embeddings"))
  return ModelConfig(vision, connector, text, hf.image_token_id)


def complete(fields: dict[str, Any]) -> dict[str, Any]:
  """All fields of `config.json`, with transformers' defaults for absent ones."""
  full = files.complete_fields(files.read_config("InternVLConfig", fields))
  return full | {"tie_word_embeddings": config(fields, "config.json").text.tie_word_embeddings}


def load_processor(directory: pathlib.Path) -> files.ModelFiles:
  """Loads the tokenizer and the image processor; raises `UserError` if that fails."""
  return files.load(directory, "GotOcr2ImageProcessorPil")


def processor(
  own: files.ModelFiles, config: ModelConfig, template: str = "chat", max_image_tokens: int | None = None
) -> TiledProcessor:
  """The processor for a template; raises `UserError` if template, image processor or limit cannot be used."""
  side = own.image_processor.size["height"]
  most = most_tiles(max_image_tokens, config.num_image_tokens(side, side), own.image_processor.max_patches)
  return TiledProcessor(own, config, _tiling(own.image_processor, most), template)


def _tiling(image_processor: Any, most: int) -> Tiling:
  from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

  height, width = image_processor.size["height"], image_processor.size["width"]
  fewest = image_processor.min_patches
  if height != width:
    raise UserError(f"preprocessor_config.json: tiles of {height} x {width} pixels are not supported; square ones are")
  if not 1 <= fewest <= image_processor.max_patches:
    raise UserError(
      f"preprocessor_config.json: min_patches {fewest} and max_patches {image_processor.max_patches} allow no number of "
      "tiles"
    )
  fewest = min(fewest, most)

  def grid(size: tuple[int, int]) -> Grid:
    columns, rows = get_optimal_tiled_canvas(size[::-1], (height, width), fewest, most)
    return rows, columns

  def pixels(image: Image.Image) -> Float[np.ndarray, "T 3 h w"]:
    cut = dict(crop_to_patches=True, min_patches=fewest, max_patches=most)
    return np.asarray(image_processor(image, return_tensors="np", **cut)["pixel_values"], np.float32)

  return Tiling(height, grid, pixels, lambda image_token, grid: START + image_token + END)


FAMILIES = (
  Family(
    "internvl",
    config,
    complete,
    load_processor,
    processor,
    image_token=lambda tokenizer: getattr(tokenizer, "context_image_token", CONTEXT),
  ),
)
