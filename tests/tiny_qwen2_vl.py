"""Random checkpoints of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, as `save_pretrained` writes them, with their image processor."""

import dataclasses
import math
import pathlib

import tokenizers
import torch
import transformers
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

PATCH, LAYERS = 4, 4
MIN_PIXELS, MAX_PIXELS = 4 * 8 * 8, 24 * 8 * 8
VISION_START, VISION_END, IMAGE = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", VISION_START, VISION_END, IMAGE, "<|video_pad|>")
VOCAB_SIZE = 272
CHAT_TEMPLATE = (
  "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
  "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
  "{% for part in message['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
  "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

VISION = dict(depth=LAYERS, num_heads=4, patch_size=PATCH, spatial_merge_size=2, temporal_patch_size=2)
TEXT = dict(
  vocab_size=VOCAB_SIZE,
  hidden_size=64,
  intermediate_size=96,
  num_hidden_layers=LAYERS,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=512,
  bos_token_id=None,
  eos_token_id=2,
  pad_token_id=0,
)


def _rope(*sections: int, **more) -> dict:
  return {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": list(sections), **more}


# model type -> class, vision config, text config, changes to the whole config
SPECS = {
  "qwen2_vl": (
    "Qwen2VL",
    VISION | dict(embed_dim=32, hidden_size=64, mlp_ratio=2),
    TEXT
    | dict(rope_parameters=_rope(2, 3, 3))
    | dict(use_sliding_window=True, sliding_window=60, max_window_layers=2),  # shorter than the prompts
    dict(tie_word_embeddings=True),
  ),
  # Windows of 4 x 4 patches but in layers 1 and 3.
  "qwen2_5_vl": (
    "Qwen2_5_VL",
    VISION
    | dict(hidden_size=32, out_hidden_size=64, intermediate_size=44, window_size=16, fullatt_block_indexes=[1, 3]),
    TEXT | dict(rope_parameters=_rope(2, 3, 3)),
    dict(tie_word_embeddings=False),
  ),
  # 6 x 6 learned positions; features of layers 0 to 2 enter the decoder after its first three layers.
  "qwen3_vl": (
    "Qwen3VL",
    VISION
    | dict(hidden_size=32, out_hidden_size=64, intermediate_size=48, num_position_embeddings=36)
    | dict(deepstack_visual_indexes=[0, 1, 2]),
    TEXT | dict(head_dim=24, rope_parameters=_rope(6, 3, 3, mrope_interleaved=True)),
    dict(tie_word_embeddings=False),
  ),
}


@dataclasses.dataclass(frozen=True)
class Tiny:
  """A checkpoint on disk and the same model, image processor and tokenizer in transformers."""

  directory: pathlib.Path
  model: torch.nn.Module
  image_processor: Qwen2VLImageProcessorPil
  tokenizer: transformers.PreTrainedTokenizerFast

  def encode(self, images, text: str) -> dict[str, torch.Tensor]:
    """The model's inputs for a prompt that has one `IMAGE` for each picture."""
    if not images:
      ids = self.tokenizer(text, return_tensors="pt")["input_ids"]
      return {"input_ids": ids, "mm_token_type_ids": torch.zeros_like(ids)}
    made = self.image_processor(images=list(images), return_tensors="pt")
    pieces = text.split(IMAGE)
    for number, grid in enumerate(made["image_grid_thw"]):
      pieces[number] += IMAGE * (int(grid.prod()) // 4)
    ids = self.tokenizer("".join(pieces), return_tensors="pt")["input_ids"]
    types = (ids == self.model.config.image_token_id).int()
    return {"input_ids": ids, "mm_token_type_ids": types, **made}


def make(name: str, directory: pathlib.Path) -> Tiny:
  """Draws the checkpoint of a model type and saves it."""
  kind, vision, text, more = SPECS[name]
  ids = {f"{part}_token_id": SPECIAL.index(f"<|{part}|>") for part in ("vision_start", "vision_end")}
  ids |= {f"{part}_token_id": SPECIAL.index(f"<|{part}_pad|>") for part in ("image", "video")}
  config = getattr(transformers, f"{kind}Config")(vision_config=vision, text_config=text, **ids, **more)
  config._attn_implementation = "eager"
  model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
  _randomize(model, seed=sum(map(ord, name)))
  model.generation_config = transformers.GenerationConfig(eos_token_id=[2, 0], pad_token_id=0)
  model.save_pretrained(directory)
  images = Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=2, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
  images.save_pretrained(directory)
  tokenizer = _tokenizer()
  tokenizer.save_pretrained(directory)
  return Tiny(directory, model, images, tokenizer)


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
  """One token per byte of text."""
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  vocab = {token: index for index, token in enumerate((*SPECIAL, *alphabet))}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  tokenizer.add_special_tokens(list(SPECIAL))
  made = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, eos_token=SPECIAL[2], pad_token=SPECIAL[0], extra_special_tokens=list(SPECIAL[1:])
  )
  made.chat_template = CHAT_TEMPLATE
  return made


@torch.no_grad()
def _randomize(model: torch.nn.Module, seed: int) -> None:
  """Weights with which every layer matters and attention picks a few tokens."""
  generator = torch.Generator().manual_seed(seed)
  for name, parameter in model.named_parameters():
    normal = torch.randn(parameter.shape, generator=generator)
    if ("norm" in name or "ln_q" in name) and name.endswith("weight"):
      parameter.copy_(1 + 0.2 * normal)
    elif name.endswith("bias"):
      parameter.copy_(0.2 * normal)
    elif "embed" in name and "patch" not in name:
      parameter.copy_(0.5 * normal)
    else:
      gain = 1.4 if any(part in name for part in ("q_proj", "k_proj", "o_proj", "down_proj")) else 1.0
      parameter.copy_(gain / math.sqrt(parameter[0].numel()) * normal)
  if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
    model.get_output_embeddings().weight.mul_(2)
