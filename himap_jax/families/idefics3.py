"""Idefics3 and SmolVLM: SigLIP, a pixel shuffle, one linear layer and a LLaMA decoder (arXiv 2408.12637, 2504.05299).

A picture is scaled to a whole number of tiles; every tile is a run of image tokens of its own in the prompt.
"""

import functools
import math
import pathlib
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from himap_jax.errors import UserError, check_supported
from himap_jax.families import files
from himap_jax.families.family import Family
from himap_jax.families.text import text_config
from himap_jax.families.tiles import Grid, TiledProcessor, Tiling, most_tiles
from himap_jax.model.config import LinearConfig, ModelConfig, VisionConfig
from himap_jax.model.linear import ACTIVATIONS

# By `model_type`: transformers' config and image processor.
CLASSES = {
  "idefics3": ("Idefics3Config", "Idefics3ImageProcessorPil"),
  "smolvlm": ("SmolVLMConfig", "SmolVLMImageProcessorPil"),
}
TEXT_MODELS = ("llama",)
MAX_SIDE = 4096  # of a scaled picture
AROUND, WHOLE = "<fake_token_around_image>", "<global-img>"


def config(fields: dict[str, Any], where: str) -> ModelConfig:
  """The sizes described by an Idefics3 or SmolVLM `config.json`; absent fields take transformers' defaults.

  Raises:
    UserError: the decoder, an activation or the pixel shuffle is not supported; the message says what is.
  """
  text_type = (fields.get("text_config") or {}).get("model_type", "llama")
  check_supported(text_type, TEXT_MODELS, where=where, what="language model")
  hf = _complete(fields, where)
  vision, merge_size = hf.vision_config, hf.scale_factor
  check_supported(vision.hidden_act, ACTIVATIONS, where=where, what="activation")
  if not isinstance(vision.image_size, int) or not isinstance(vision.patch_size, int):
    raise UserError(f"{where}: a tower for pictures or patches that are not square is not supported")
  if vision.image_size // vision.patch_size % merge_size:
    raise UserError(
      f"{where}: scale_factor {merge_size} does not divide the {vision.image_size // vision.patch_size} patches of a "
      "tile's side"
    )
  tower = VisionConfig(
    # Their positions are SigLIP's for tiles of the size that it was trained on. For some sides that no checkpoint has
    # (19, 25, 29 patches …) transformers' differ by rounding.
    model_type="siglip_vision_model",
    hidden_size=vision.hidden_size,
    intermediate_size=vision.intermediate_size,
    num_hidden_layers=vision.num_hidden_layers,
    num_attention_heads=vision.num_attention_heads,
    image_size=vision.image_size,
    patch_size=vision.patch_size,
    hidden_act=vision.hidden_act,
    layer_norm_eps=vision.layer_norm_eps,
    feature_layers=(vision.num_hidden_layers,),
    select_strategy="full",
    has_class_token=False,
    final_norm=True,
    merge_size=merge_size,
  )
  return ModelConfig(tower, LinearConfig(use_bias=False), text_config(hf.text_config, where), hf.image_token_id)


def complete(fields: dict[str, Any]) -> dict[str, Any]:
  """All fields of `config.json`, with transformers' defaults for absent ones."""
  return files.complete_fields(_complete(fields, "config.json"))


def _complete(fields: dict[str, Any], where: str) -> Any:
  """transformers' config, in which the whole model decides whether the head is tied."""
  kind, _ = CLASSES[fields["model_type"]]
  hf = files.read_config(kind, fields, where)
  hf.text_config.tie_word_embeddings = hf.tie_word_embeddings
  return hf


def load_processor(model_type: str, directory: pathlib.Path) -> files.ModelFiles:
  """Loads the tokenizer and the image processor; raises `UserError` if that fails."""
  _, image_processor = CLASSES[model_type]
  return files.load(directory, image_processor)


def processor(
  own: files.ModelFiles, config: ModelConfig, template: str = "chat", max_image_tokens: int | None = None
) -> TiledProcessor:
  """The processor for a template; raises `UserError` if template, image processor or limit cannot be used."""
  side, trained = own.image_processor.max_image_size["longest_edge"], config.vision.image_size
  if side != trained:
    raise UserError(f"preprocessor_config.json: max_image_size is {side}; the tower in config.json needs {trained}")
  longest = own.image_processor.size.longest_edge if own.image_processor.do_resize else None
  if own.image_processor.do_resize and not longest:
    raise UserError("preprocessor_config.json: size without longest_edge is not supported")
  if max_image_tokens is not None:
    most = most_tiles(max_image_tokens, config.num_image_tokens(side, side), (MAX_SIDE // side) ** 2)
    longest = min(longest or MAX_SIDE, math.isqrt(most) * side)
  return TiledProcessor(own, config, _tiling(own.image_processor, side, longest), template)


def _tiling(image_processor: Any, side: int, longest: int | None) -> Tiling:

  def grid(size: tuple[int, int]) -> Grid:
    return tiles_of(size, side, longest) if image_processor.do_image_splitting else (1, 1)

  def pixels(image: Image.Image) -> Float[np.ndarray, "T 3 h w"]:
    scaled = {} if longest is None else dict(do_resize=True, size={"longest_edge": longest})
    return np.asarray(image_processor(image, return_tensors="np", **scaled)["pixel_values"][0], np.float32)

  return Tiling(side, grid, pixels, text_of)


def tiles_of(size: tuple[int, int], side: int, longest: int | None) -> Grid:
  """Rows and columns of tiles of a picture of `(width, height)` pixels, whose longest side is scaled to `longest`.

  The result is that of transformers' image processor, whose every step rounds.
  """
  width, height = size
  if longest is not None:
    is_wide = width >= height
    width, height = _scaled(width, height, longest)
    width, height = (width, height + height % 2) if is_wide else (width + width % 2, height)
    width, height = max(width, 1), max(height, 1)
    if max(width, height) > MAX_SIDE:
      width, height = (max(x, 1) for x in _scaled(width, height, MAX_SIDE))
  scaled = _scaled(width, height, math.ceil(max(width, height) / side) * side)
  columns, rows = (math.ceil(x / side) for x in scaled)
  return rows, columns


def _scaled(width: int, height: int, longest: int) -> tuple[int, int]:
  """The size after the longest side is scaled to `longest`."""
  ratio = width / height
  return (longest, int(longest / ratio)) if width >= height else (int(longest * ratio), longest)


def text_of(image_token: str, grid: Grid) -> str:
  """A picture in a prompt: a line for every row of tiles, and the whole picture after an empty one."""
  rows, columns = grid
  whole = f"{AROUND}{WHOLE}{image_token}{AROUND}"
  if rows * columns == 1:
    return whole
  lines = [
    "".join(f"{AROUND}<row_{row}_col_{column}>{image_token}" for column in range(1, columns + 1))
    for row in range(1, rows + 1)
  ]
  return "".join(f"{line}\n" for line in lines) + f"\n{whole}"


FAMILIES = tuple(
  Family(model_type, config, complete, functools.partial(load_processor, model_type), processor)
  for model_type in CLASSES
)
