"""A random Gemma 3 checkpoint, saved as Hugging Face saves it, with a chat template like the published one."""

import dataclasses
import pathlib

import tiny_checkpoints
import tokenizers
import torch
import transformers

SIDE, PATCH, NUM_IMAGE_TOKENS, WINDOW = (
  48,
  6,
  16,
  10,
)  # 8 x 8 patches, averaged to 4 x 4; the window is shorter than that
NAMED = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
BOS, EOS, PAD, START, END = "<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>"
TOKENS = (PAD, EOS, BOS, START, END, *NAMED.values())
CHAT_TEMPLATE = (
  "{{ bos_token }}{% set system = '' %}{% set turns = messages %}"
  "{% if messages[0]['role'] == 'system' %}"
  "{% set system = messages[0]['content'][0]['text'] + '\n\n' %}{% set turns = messages[1:] %}{% endif %}"
  "{% for message in turns %}"
  "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
  "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n{{ system if loop.first }}"
  "{% for part in message['content'] %}"
  "{{ '<start_of_image>' if part['type'] == 'image' else part['text'] | trim }}{% endfor %}<end_of_turn>\n{% endfor %}"
  "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
TEXT = dict(
  vocab_size=272,
  hidden_size=48,
  intermediate_size=96,
  num_hidden_layers=6,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=16,
  query_pre_attn_scalar=24,
  sliding_window=WINDOW,
  sliding_window_pattern=3,
  max_position_embeddings=512,
  rope_scaling={"rope_type": "linear", "factor": 8.0},
)
VISION = tiny_checkpoints.SIGLIP | dict(image_size=SIDE, patch_size=PATCH, vision_use_head=False)


@dataclasses.dataclass(frozen=True)
class TinyGemma:
  """A checkpoint on disk, and the same model and processor of transformers."""

  directory: pathlib.Path
  model: transformers.Gemma3ForConditionalGeneration
  processor: transformers.Gemma3Processor


def make(directory: pathlib.Path) -> TinyGemma:
  """Draws a checkpoint and saves it to `directory`."""
  ids = {f"{name.removesuffix('_token')}_token_index": TOKENS.index(token) for name, token in NAMED.items()}
  config = transformers.Gemma3Config(
    vision_config=VISION, text_config=TEXT, mm_tokens_per_image=NUM_IMAGE_TOKENS, eos_token_id=[1, 4], **ids
  )
  config._attn_implementation = "eager"
  model = transformers.Gemma3ForConditionalGeneration(config).eval()
  tiny_checkpoints.randomize(model, seed=3)
  model.generation_config = transformers.GenerationConfig(bos_token_id=2, eos_token_id=[1, 4], pad_token_id=0)
  model.save_pretrained(directory)
  image_processor = transformers.Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE})
  processor = transformers.Gemma3Processor(
    image_processor, tokenizer(), chat_template=CHAT_TEMPLATE, image_seq_length=NUM_IMAGE_TOKENS
  )
  processor.image_processor.save_pretrained(directory)
  processor.tokenizer.chat_template = CHAT_TEMPLATE
  processor.tokenizer.save_pretrained(directory)
  return TinyGemma(directory, model, processor)


def tokenizer() -> transformers.PreTrainedTokenizerFast:
  """One token for each byte of text."""
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  own = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={t: n for n, t in enumerate((*TOKENS, *alphabet))}, merges=[]))
  own.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  own.decoder = tokenizers.decoders.ByteLevel()
  own.add_special_tokens(list(TOKENS))
  own.post_processor = tokenizers.processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 2)])
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=own, bos_token=BOS, eos_token=EOS, pad_token=PAD, extra_special_tokens=NAMED
  )


@torch.no_grad()
def logits(tiny: TinyGemma, tokens: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
  """`[S, V]` logits of one prompt, whose masks transformers makes itself."""
  is_image = (tokens == tiny.model.config.image_token_id).long()
  return tiny.model(input_ids=tokens[None], pixel_values=pixels, token_type_ids=is_image[None]).logits[0]
