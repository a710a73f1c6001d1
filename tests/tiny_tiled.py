"""Random checkpoints of the families that cut pictures into tiles, as Hugging Face saves them.

Tiles have 28 pixels, 4 x 4 patches and 2 x 2 image tokens. The chat templates are those of the published checkpoints.
"""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import tiny_checkpoints
import torch
import transformers
from transformers.models.internvl.processing_internvl import InternVLProcessor

SIDE, TILE_TOKENS = 28, 4
TEXT = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
TEXT |= dict(vocab_size=tiny_checkpoints.VOCAB_SIZE, max_position_embeddings=1024, rms_norm_eps=1e-5)
TEXT |= dict(bos_token_id=0, eos_token_id=1, pad_token_id=2)
INTERNVIT = tiny_checkpoints.INTERNVIT | dict(hidden_size=30, num_hidden_layers=3)
SMALL_INTERNVIT = INTERNVIT | dict(use_qk_norm=False, norm_type="layer_norm", attention_bias=True)

INTERNVL_TEMPLATE = (
  "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}{% for content in message['content'] %}"
  "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\\n' }}{% elif content['type'] == 'text' %}{{ content['text'] }}"
  "{% endif %}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# name -> (vision config, changes to TEXT)
INTERNVL = {
  "internvl": (SMALL_INTERNVIT, dict(model_type="qwen3", head_dim=16)),
  # InternViT-6B's options, and a norm after the tower.
  "internvl_6b": (INTERNVIT | dict(use_mean_pooling=False), dict(model_type="qwen2")),
}


@dataclasses.dataclass(frozen=True)
class Tiled:
  """A checkpoint on disk, the same model in torch, and transformers' processing without the parts that need torchvision.

  Attributes:
    model: float32, eager attention, evaluation mode.
    image_processor: transformers', in numpy, and how its processor calls it.
    expand: `replace_image_token` of transformers' processor.
  """

  directory: pathlib.Path
  model: Any
  tokenizer: Any
  image_processor: Any
  image_arguments: dict[str, Any]
  expand: Any

  @property
  def image_token(self) -> str:
    return self.tokenizer.convert_ids_to_tokens(self.model.config.image_token_id)

  def pixels(self, image) -> np.ndarray:
    pixels = self.image_processor(image, return_tensors="np", **self.image_arguments)["pixel_values"]
    return pixels.reshape(-1, *pixels.shape[-3:])

  def batched(self, pixels: torch.Tensor) -> torch.Tensor:
    """Tiles as the model takes them."""
    return pixels

  def features(self, pixels: torch.Tensor) -> torch.Tensor:
    """Image tokens of tiles, [N, D]."""
    return torch.cat(list(self.model.get_image_features(self.batched(pixels)).pooler_output))

  def encode(self, images, prompt: str) -> list[int]:
    """Token ids of a prompt with an image token for each of the images."""
    own = [self.image_processor(image, return_tensors="np", **self.image_arguments) for image in images]
    first, *others = prompt.split(self.image_token)
    text = first + "".join(self.expand(inputs, 0) + after for inputs, after in zip(own, others, strict=True))
    return self.tokenizer(text)["input_ids"]


def make(name: str, directory: pathlib.Path) -> Tiled:
  """Draws a checkpoint and saves it."""
  vision, text = INTERNVL[name]
  config = transformers.InternVLConfig(
    vision_config=vision,
    text_config=TEXT | text,
    image_token_id=262,
    image_seq_length=TILE_TOKENS,
    tie_word_embeddings=False,
  )
  tokenizer = _tokenizer(INTERNVL_TEMPLATE, ["<img>", "</img>", "<IMG_CONTEXT>", "<|im_start|>", "<|im_end|>"])
  size = {"height": SIDE, "width": SIDE}
  image_processor = transformers.GotOcr2ImageProcessorPil(size=size, min_patches=1, max_patches=4)
  reference = object.__new__(InternVLProcessor)
  vars(reference).update(start_image_token="<img>", end_image_token="</img>", image_token="<IMG_CONTEXT>")
  vars(reference).update(image_seq_length=TILE_TOKENS)
  model = _save(transformers.InternVLForConditionalGeneration, config, directory)
  tokenizer.save_pretrained(directory)
  image_processor.save_pretrained(directory)
  arguments = dict(crop_to_patches=True)
  return Tiled(directory, model, tokenizer, image_processor, arguments, reference.replace_image_token)


def _tokenizer(template: str, special: list[str]) -> Any:
  tokenizer = tiny_checkpoints.byte_tokenizer()
  tokenizer.add_special_tokens({"additional_special_tokens": special})
  tokenizer.chat_template = template
  return tokenizer


def _save(kind: type, config: Any, directory: pathlib.Path) -> Any:
  config._attn_implementation = "eager"
  model = kind(config).eval()
  tiny_checkpoints.randomize(model, seed=3)
  model.generation_config = transformers.GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=2)
  model.save_pretrained(directory)
  return model


def changed(tiny: Tiled, target: pathlib.Path, file: str, **fields: Any) -> pathlib.Path:
  """A copy of a checkpoint with other fields in one of its JSON files."""
  target.mkdir()
  for path in tiny.directory.iterdir():
    (target / path.name).write_bytes(path.read_bytes())
  (target / file).write_text(json.dumps(json.loads((target / file).read_text()) | fields))
  return target


@torch.no_grad()
def logits(tiny: Tiled, tokens: np.ndarray, pixels: np.ndarray | None) -> np.ndarray:
  """Logits of every position of a prompt with its tiles."""
  pixels = {} if pixels is None else {"pixel_values": tiny.batched(torch.from_numpy(pixels))}
  return tiny.model(torch.from_numpy(tokens)[None].long(), **pixels).logits[0].numpy()
