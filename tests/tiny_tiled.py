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
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor

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

SMOLVLM_TEMPLATE = (
  "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
  "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
  "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
  "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
  "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
SMOLVLM_TOKENS = ("<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<global-img>")
SMOLVLM_TOKENS += ("<row_1_col_1>", "<row_1_col_2>", "<row_2_col_1>")  # others are several tokens
SIGLIP = tiny_checkpoints.SIGLIP | dict(patch_size=7, image_size=SIDE)

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
    return pixels if self.model.config.model_type == "internvl" else pixels[None]

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
  build = _internvl if name in INTERNVL else _idefics3
  model, tokenizer, image_processor, arguments, reference = build(name)
  tiny_checkpoints.randomize(model, seed=3)
  model.generation_config = transformers.GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=2)
  for part in (model, tokenizer, image_processor):
    part.save_pretrained(directory)
  return Tiled(directory, model, tokenizer, image_processor, arguments, reference.replace_image_token)


def _internvl(name: str) -> tuple[Any, ...]:
  vision, text = INTERNVL[name]
  config = transformers.InternVLConfig(
    vision_config=vision, text_config=TEXT | text, image_token_id=262, image_seq_length=TILE_TOKENS
  )
  model = _model(transformers.InternVLForConditionalGeneration, config)
  tokenizer = _tokenizer(INTERNVL_TEMPLATE, ["<img>", "</img>", "<IMG_CONTEXT>", "<|im_start|>", "<|im_end|>"])
  size = {"height": SIDE, "width": SIDE}
  image_processor = transformers.GotOcr2ImageProcessorPil(size=size, min_patches=1, max_patches=4)
  tokens = dict(start_image_token="<img>", end_image_token="</img>", image_token="<IMG_CONTEXT>")
  reference = _reference(InternVLProcessor, **tokens, image_seq_length=TILE_TOKENS)
  return model, tokenizer, image_processor, dict(crop_to_patches=True), reference


def _idefics3(name: str) -> tuple[Any, ...]:
  is_smolvlm = name == "smolvlm"
  kind = "SmolVLM" if is_smolvlm else "Idefics3"
  text = TEXT | dict(model_type="llama")
  config = getattr(transformers, f"{kind}Config")(
    vision_config={key: value for key, value in SIGLIP.items() if key != "model_type"},
    text_config=text,
    image_token_id=3,
    scale_factor=2,
    tie_word_embeddings=is_smolvlm,
  )
  model = _model(getattr(transformers, f"{kind}ForConditionalGeneration"), config)
  sizes = dict(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
  image_processor = getattr(transformers, f"{kind}ImageProcessorPil")(**sizes)
  tokens = dict(fake_image_token="<fake_token_around_image>", image_token="<image>")
  tokens |= dict(global_image_tag="<global-img>", global_image_token="<global-img>", image_seq_len=TILE_TOKENS)
  reference = _reference(SmolVLMProcessor if is_smolvlm else Idefics3Processor, **tokens)
  tokenizer = _tokenizer(SMOLVLM_TEMPLATE, list(SMOLVLM_TOKENS))
  return model, tokenizer, image_processor, dict(return_row_col_info=True), reference


def _reference(kind: type, **fields: Any) -> Any:
  """A processor of transformers that can expand image tokens, made without what it needs for videos."""
  processor = object.__new__(kind)
  vars(processor).update(fields)
  return processor


def _tokenizer(template: str, special: list[str]) -> Any:
  tokenizer = tiny_checkpoints.byte_tokenizer()
  tokenizer.add_special_tokens({"additional_special_tokens": special})
  tokenizer.chat_template = template
  return tokenizer


def _model(kind: type, config: Any) -> Any:
  config._attn_implementation = "eager"
  return kind(config).eval()


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
