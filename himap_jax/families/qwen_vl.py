"""Qwen-VL: a ViT-bigG tower, a resampler with 256 queries and a Qwen-7B decoder (Bai et al., arXiv 2308.12966).

Its remote code is never run: the tokenizer is built from `qwen.tiktoken`, and the prompts are those of the authors'
`make_context` and evaluation scripts.
"""

import itertools
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image

from checkpoints_convert.json_files import read_json
from himap_jax.errors import UserError
from himap_jax.families import tiktoken
from himap_jax.families.examples import blank, expand, places_in, refuse_limit, tiles_of, views_of_patches
from himap_jax.families.family import Family, Message, Question, View
from himap_jax.families.files import PromptFiles
from himap_jax.families.prompts import (
  IMAGE_TAG,
  answer_text,
  fill,
  literal_template,
  messages_of,
  refuse_tokens,
)
from himap_jax.inputs import Example, Images, ImageSize
from himap_jax.model.config import ModelConfig, ResamplerConfig, RopeConfig, TextConfig, VisionConfig

# Fields of the authors' configuration classes, with their defaults.
DEFAULTS = {
  "vocab_size": 151_936,
  "hidden_size": 4096,
  "intermediate_size": 22_016,
  "num_hidden_layers": 32,
  "num_attention_heads": 32,
  "kv_channels": 128,
  "layer_norm_epsilon": 1e-6,
  "rotary_emb_base": 10_000.0,
  "rotary_pct": 1.0,
  "seq_length": 2048,
  "no_bias": True,
  "tie_word_embeddings": False,
}
SIZES = ("width", "layers", "heads", "mlp_ratio", "patch_size", "image_size", "image_start_id")
NUM_QUERIES = 256
NUM_POSITIONS = 256  # of the tower's position embedding, a square
TOWER_EPSILON = 1e-6
RESAMPLER_HEAD_DIM = 128

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

END, CHAT_START, CHAT_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTENT_TOKENS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>")
SPECIAL_TOKENS = (END, CHAT_START, CHAT_END, *(f"<|extra_{number}|>" for number in range(205)), *CONTENT_TOKENS)
SYSTEM = "You are a helpful assistant."
TEMPLATES = {"vqa": "<image>{question} Answer:", "caption": "<image>{question}", "mme": "<image>\n{question}"}


def config(fields: dict[str, Any], where: str) -> ModelConfig:
  """The sizes described by a Qwen-VL `config.json`; absent fields take the authors' defaults.

  Raises:
    UserError: fields of another family, missing or inconsistent sizes, or an option that the authors never used.
  """
  full = complete(fields)
  vision = fields.get("visual")
  if not isinstance(vision, dict):
    raise UserError(f"{where}: no visual; Qwen without a vision tower is not supported")
  foreign = [name for name in ("vision_config", "text_config") if name in fields]
  if foreign:
    raise UserError(f"{where}: {', '.join(foreign)} beside visual; the fields are of two model families")
  missing = [name for name in SIZES if vision.get(name) is None]
  if missing:
    raise UserError(f"{where}: visual lacks {', '.join(missing)}")
  width, heads = full["hidden_size"], full["num_attention_heads"]
  for name, value, needed in (
    ("visual.output_dim", vision.get("output_dim", width), width),
    ("kv_channels × num_attention_heads", full["kv_channels"] * heads, width),
    ("hidden_size in multiples of the resampler's heads", width % RESAMPLER_HEAD_DIM, 0),
    ("rotary_pct", full["rotary_pct"], 1),
    ("no_bias", full["no_bias"], True),
  ):
    if value != needed:
      raise UserError(f"{where}: {name} is {value}; supported: {needed}")
  num_queries = vision.get("n_queries", NUM_QUERIES)
  if round(num_queries**0.5) ** 2 != num_queries:
    raise UserError(f"{where}: visual.n_queries is {num_queries}, not a square number")
  tower = VisionConfig(
    model_type="qwen_vl_vision",
    hidden_size=vision["width"],
    intermediate_size=int(vision["width"] * vision["mlp_ratio"]),
    num_hidden_layers=vision["layers"],
    num_attention_heads=vision["heads"],
    image_size=round(NUM_POSITIONS**0.5) * vision["patch_size"],
    patch_size=vision["patch_size"],
    hidden_act="gelu",
    layer_norm_eps=TOWER_EPSILON,
    feature_layers=(vision["layers"],),
    select_strategy="full",
    has_class_token=False,
    patch_bias=False,
  )
  text = TextConfig(
    vocab_size=full["vocab_size"],
    hidden_size=width,
    intermediate_size=full["intermediate_size"] // 2,
    num_hidden_layers=full["num_hidden_layers"],
    num_attention_heads=heads,
    num_key_value_heads=heads,
    head_dim=full["kv_channels"],
    rms_norm_eps=full["layer_norm_epsilon"],
    max_position_embeddings=full["seq_length"],  # beyond it attention is rescaled, which is not supported
    tie_word_embeddings=full["tie_word_embeddings"],
    hidden_act="silu",
    rope=RopeConfig(full["rotary_emb_base"]),
    rotary_dim=full["kv_channels"],
    qkv_bias=True,
  )
  connector = ResamplerConfig(num_queries, width // RESAMPLER_HEAD_DIM, TOWER_EPSILON)
  return ModelConfig(tower, connector, text, image_token_id=vision["image_start_id"] + 2)


def complete(fields: dict[str, Any]) -> dict[str, Any]:
  """All fields of `config.json`, with the authors' defaults for absent ones."""
  return DEFAULTS | fields


def load_processor(directory: pathlib.Path) -> PromptFiles:
  """Builds the tokenizer from `qwen.tiktoken`, and the image processor; raises `UserError` for unusable files."""
  import transformers  # slow to import

  visual = read_json(directory / "config.json")["visual"]
  first_special = visual["image_start_id"] - SPECIAL_TOKENS.index("<img>")
  ranks = tiktoken.read_ranks(directory / "qwen.tiktoken", first_special)
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tiktoken.bpe(ranks, SPECIAL_TOKENS),
    eos_token=END,
    pad_token=END,
    extra_special_tokens=list(SPECIAL_TOKENS[1:]),
  )
  size = {"height": visual["image_size"], "width": visual["image_size"]}
  images = transformers.CLIPImageProcessorPil(
    size=size, do_center_crop=False, image_mean=list(MEAN), image_std=list(STD), resample=Image.Resampling.BICUBIC
  )
  return PromptFiles(tokenizer, images)


class QwenProcessor:
  """Prepares prompts for one model; see `family.Processor`."""

  def __init__(
    self, files: PromptFiles, config: ModelConfig, template: str = "chat", max_image_tokens: int | None = None
  ):
    """Checks the template: `chat`, a name in `TEMPLATES`, or a text with `<image>` and `{question}`."""
    self._files, self._config = files, config
    self._is_chat = template == "chat"
    self._template = "" if self._is_chat else literal_template(TEMPLATES.get(template, template), "chat", *TEMPLATES)
    size = files.image_processor.size
    self.image_shape = (size["height"], size["width"])
    self.patch_grid = tuple(side // config.vision.patch_size for side in self.image_shape)
    self.num_image_tokens = config.num_image_tokens(*self.image_shape)
    refuse_limit(max_image_tokens, self.num_image_tokens)
    self.blank = blank(Images(np.zeros((0, 3, *self.image_shape), np.float32)))

  def image_size(self, sizes: Sequence[tuple[int, int]]) -> ImageSize:
    return ImageSize(len(sizes), len(sizes) * self.num_image_tokens)

  def prepare(self, images: Sequence[Image.Image], question: Question) -> Example:
    refuse_tokens(question, ["<img>", "</img>", "<imgpad>"])
    ids = []
    for text, is_content in self._pieces(question, len(images)):
      ids += self._ids(text, CONTENT_TOKENS if is_content else (CHAT_START, CHAT_END))
    pixels = tiles_of(self._files.image_processor, images, self.blank)
    return expand(ids, self._config.image_token_id, [self.num_image_tokens] * len(images), Images(pixels))

  def prompt(self, question: Question, num_pictures: int = 1) -> str:
    return "".join(text for text, _ in self._pieces(question, num_pictures))

  def decode(self, tokens: Sequence[int]) -> str:
    return answer_text(self._files.tokenizer, tokens)

  def views(self, example: Example) -> list[View]:
    return views_of_patches(self._files.image_processor, example, self.patch_grid, self._config.vision.patch_size)

  def places(self, example: Example) -> Int[np.ndarray, "N 4"]:
    return places_in(self.views(example), example.num_image_tokens)

  def _pieces(self, question: Question, num_pictures: int) -> list[tuple[str, bool]]:
    """The prompt in pieces, each with whether it is a user's text."""
    if not self._is_chat:
      return [(fill(self._template, question, num_pictures).replace(IMAGE_TAG, "<img><imgpad></img>"), True)]
    messages, number = messages_of(question, num_pictures), itertools.count(1)
    if messages[0].role != "system":
      messages.insert(0, Message("system", SYSTEM))
    pieces = []
    for role, text in messages:  # as the authors' make_context and from_list_format
      text = re.sub(IMAGE_TAG, lambda _: f"Picture {next(number)}: <img><imgpad></img>\n", text)
      pieces += [(f"{CHAT_START}{role}\n", False), (text, True), (f"{CHAT_END}\n", False)]
    return [*pieces, (f"{CHAT_START}assistant\n", False)]

  def _ids(self, text: str, special: Sequence[str]) -> list[int]:
    """Token ids of a text in which only the given special tokens are special: a user could write the others."""
    tokenizer, ids = self._files.tokenizer, []
    for number, piece in enumerate(re.split(f"({'|'.join(map(re.escape, special))})", text)):
      if number % 2:
        ids.append(tokenizer.convert_tokens_to_ids(piece))
      else:
        ids += tokenizer(piece, split_special_tokens=True)["input_ids"]
    return ids


def stop_tokens(files: PromptFiles) -> tuple[int, ...]:
  """The end of the text, and the end and the start of a message."""
  return tuple(files.tokenizer.convert_tokens_to_ids([END, CHAT_START, CHAT_END]))


FAMILIES = (
  Family(
    "qwen",
    config,
    complete,
    load_processor,
    QwenProcessor,
    stop_tokens=stop_tokens,
    image_token=lambda tokenizer: "<imgpad>",
  ),
)
