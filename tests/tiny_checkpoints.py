"""Random LLaVA checkpoints of a few hundred thousand parameters, saved as Hugging Face saves them.

Between them they cover what a LLaVA config can say: four vision towers, both select strategies, feature layers
counted from the end and a list of them, every language model, MHA and GQA, tied and untied heads, biases, a head
dimension that is not hidden size / heads, three kinds of rotary embedding, and sliding windows. Weights are drawn
so that attention is far from uniform and every layer matters: with transformers' own initialisation a wrong mask or
a wrong position hardly moves the logits.

    python tests/tiny_checkpoints.py clip_mha DIRECTORY
"""

import dataclasses
import math
import pathlib
import sys

import numpy as np
import PIL.Image
import tokenizers
import torch
import transformers

BOS, EOS, PAD, IMAGE = "<s>", "</s>", "<pad>", "<image>"
SPECIAL_TOKENS = (BOS, EOS, PAD, IMAGE)
AMPLIFIED = ("q_proj", "k_proj", "qkv_proj", "query", "key", "o_proj", "down_proj")
VOCAB_SIZE = 272  # 4 special tokens, 256 bytes, and the unused rows that padding a vocabulary leaves
CHAT_TEMPLATE = (
  "{{ bos_token }}{% for message in messages %}{{ message['role'] | upper }}: "
  "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}"
  "{% endif %}{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Tiny:
  """A checkpoint on disk and the same model in torch.

  Attributes:
    directory: the checkpoint, in the Hugging Face layout.
    model: transformers' LlavaForConditionalGeneration, float32, eager attention, evaluation mode.
    processor: transformers' processor, loaded back from `directory`.
    num_image_tokens: N.
  """

  directory: pathlib.Path
  model: transformers.LlavaForConditionalGeneration
  processor: transformers.LlavaProcessor
  num_image_tokens: int

  def encode(self, images: PIL.Image.Image | list[PIL.Image.Image], prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [S], the images' N each included, and pixels [P, 3, H, W].

    `prompt` has one <image> for each of the images, and is used as it is.
    """
    batch = self.processor(images=images, text=prompt, return_tensors="pt", add_special_tokens=False)
    return batch["input_ids"][0], batch["pixel_values"]

  def rows(self, images: list[PIL.Image.Image]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The encoded PROMPTS, each with an image."""
    return [self.encode(image, prompt) for image, prompt in zip(images, PROMPTS, strict=True)]


# Where the image stands: after a little text, first of all, after most of the text, and before a long question.
PROMPTS = (
  "<s>USER: <image>\nWhat is it? ASSISTANT:",
  "<image>Where is the dog?",
  "<s>A longer text stands before the image here. <image> ?",
  "<s>USER: <image>\nAnd a question that is a good deal longer than the other three. ASSISTANT:",
)


CLIP = dict(
  model_type="clip_vision_model",
  hidden_size=32,
  intermediate_size=64,
  num_hidden_layers=3,
  num_attention_heads=4,
  patch_size=7,
  image_size=28,
  projection_dim=16,
)
SIGLIP = dict(
  model_type="siglip_vision_model",
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=2,
  num_attention_heads=2,
  patch_size=6,
  image_size=30,
)
DINOV2 = dict(
  model_type="dinov2",
  hidden_size=32,
  mlp_ratio=2,
  num_hidden_layers=3,
  num_attention_heads=2,
  patch_size=7,
  image_size=28,
  layerscale_value=0.7,
)
INTERNVIT = dict(
  model_type="internvl_vision",
  hidden_size=30,
  intermediate_size=60,
  num_hidden_layers=5,
  num_attention_heads=3,
  patch_size=7,
  image_size=28,
  use_qk_norm=True,
  norm_type="rms_norm",
)
LLAMA = dict(
  model_type="llama",
  vocab_size=VOCAB_SIZE,
  hidden_size=48,
  intermediate_size=96,
  num_hidden_layers=6,
  num_attention_heads=4,
  num_key_value_heads=4,
  max_position_embeddings=512,
  rms_norm_eps=1e-5,
  rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
)
LLAMA3_ROPE = {
  "rope_type": "llama3",
  "rope_theta": 500.0,
  "factor": 4.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.5}

# name -> (vision config, changes to LLAMA, changes to LlavaConfig, side of the image the processor makes)
SPECS = {
  # LLaVA-1.5 in miniature; 4x4 = 16 image tokens.
  "clip_mha": (CLIP, {}, {}, 28),
  # GQA, tied head, biases, two feature layers with their class token kept: 17 image tokens.
  "clip_gqa_tied": (
    CLIP,
    dict(num_key_value_heads=2, tie_word_embeddings=True, rope_parameters=LINEAR_ROPE)
    | dict(attention_bias=True, mlp_bias=True),
    dict(vision_feature_layer=[-2, 1], vision_feature_select_strategy="full", multimodal_projector_bias=False),
    28,
  ),
  # No class token, and the last layer: before the tower's final norm. 5x5 = 25 image tokens.
  "siglip": (
    SIGLIP,
    dict(tie_word_embeddings=True, num_hidden_layers=4),
    dict(vision_feature_layer=-1, vision_feature_select_strategy="full", projector_hidden_act="gelu_pytorch_tanh"),
    30,
  ),
  # The processor makes 35x35 images for a tower with 4x4 position embeddings: 5x5 = 25 image tokens.
  "dinov2": (
    DINOV2,
    dict(num_key_value_heads=1, head_dim=16, rope_parameters=LLAMA3_ROPE),
    {},
    35,
  ),
  # The other way round, 6x6 position embeddings for 4x4 = 16 image tokens.
  "dinov2_shrunk": (
    DINOV2 | dict(image_size=42),
    dict(num_key_value_heads=2, num_hidden_layers=4),
    {},
    28,
  ),
  # InternVL-Chat-V1.0 in miniature: 4x4 position embeddings for 6x6 = 36 image tokens, features of layer -4.
  "internvit": (INTERNVIT, dict(num_hidden_layers=4), dict(vision_feature_layer=-4), 42),
  # InternViT-300M's options: layer norms, biased queries, keys and values, no norm of queries and keys.
  "internvit_small": (
    INTERNVIT | dict(use_qk_norm=False, norm_type="layer_norm", attention_bias=True),
    dict(num_hidden_layers=4),
    {},
    28,
  ),
  # The other language models. Windows are shorter than every prompt; Qwen2's, of the last three layers, is shorter than
  # the image.
  "mistral": (CLIP, dict(model_type="mistral", num_key_value_heads=2, sliding_window=22), {}, 28),
  "qwen2": (
    CLIP,
    dict(model_type="qwen2", num_key_value_heads=2)
    | dict(use_sliding_window=True, sliding_window=10, max_window_layers=3),
    {},
    28,
  ),
  "qwen3": (
    CLIP,
    dict(model_type="qwen3", num_key_value_heads=2, head_dim=16, num_hidden_layers=4, tie_word_embeddings=True),
    {},
    28,
  ),
  "gemma": (
    SIGLIP,
    dict(model_type="gemma", num_key_value_heads=1, head_dim=16, num_hidden_layers=4, tie_word_embeddings=True),
    dict(vision_feature_layer=-1, vision_feature_select_strategy="full"),
    30,
  ),
  # Gemma 3's decoder alone: a mask by layer, two rotary embeddings, four norms a layer, a scale of its own.
  "gemma3": (
    SIGLIP,
    dict(model_type="gemma3_text", num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=24)
    | dict(tie_word_embeddings=True, sliding_window=22, sliding_window_pattern=3)
    | dict(rope_parameters={"sliding_attention": LLAMA["rope_parameters"], "full_attention": LINEAR_ROPE}),
    dict(vision_feature_layer=-1, vision_feature_select_strategy="full"),
    30,
  ),
  # Half of every head is rotated.
  "phi3": (
    CLIP,
    dict(model_type="phi3", num_key_value_heads=2, num_hidden_layers=4, sliding_window=30)
    | dict(rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}),
    {},
    28,
  ),
}


def make(name: str, directory: pathlib.Path) -> Tiny:
  """Draws the checkpoint `name` of SPECS, saves it to `directory` and loads its processor back from there."""
  vision, text_changes, llava_changes, side = SPECS[name]
  text = LLAMA | text_changes
  has_class_token = vision["model_type"] != "siglip_vision_model"
  strategy = llava_changes.get("vision_feature_select_strategy", "default")
  num_image_tokens = (side // vision["patch_size"]) ** 2 + int(has_class_token and strategy == "full")
  config = transformers.LlavaConfig(
    vision_config=vision,
    text_config=text | dict(bos_token_id=0, eos_token_id=1, pad_token_id=2),
    image_token_index=3,
    image_seq_length=num_image_tokens,
    **llava_changes,
  )
  config._attn_implementation = "eager"
  model = transformers.LlavaForConditionalGeneration(config).eval()
  randomize(model, seed=sum(map(ord, name)))
  model.generation_config = transformers.GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=2)
  model.save_pretrained(directory)

  crop = {"height": side, "width": side}
  if vision["model_type"] == "siglip_vision_model":
    image_processor = transformers.SiglipImageProcessorPil(size=crop)
  else:
    is_dinov2 = vision["model_type"] == "dinov2"
    kind = transformers.BitImageProcessorPil if is_dinov2 else transformers.CLIPImageProcessorPil
    image_processor = kind(size={"shortest_edge": side}, crop_size=crop)
  transformers.LlavaProcessor(
    image_processor=image_processor,
    tokenizer=byte_tokenizer(),
    patch_size=vision["patch_size"],
    vision_feature_select_strategy=strategy,
    num_additional_image_tokens=int(has_class_token),
    chat_template=CHAT_TEMPLATE,
  ).save_pretrained(directory)
  processor = transformers.AutoProcessor.from_pretrained(directory)
  return Tiny(directory=directory, model=model, processor=processor, num_image_tokens=num_image_tokens)


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int) -> None:
  """Redraws every parameter so that each layer moves the output by about its own size.

  Queries and keys are scaled up until attention picks a few tokens, and what a layer adds until it outweighs the
  embedding: a tied head would only ever repeat the last token otherwise.
  """
  generator = torch.Generator().manual_seed(seed)
  for name, parameter in model.named_parameters():
    normal = torch.randn(parameter.shape, generator=generator)
    if "norm" in name and name.endswith("weight"):
      parameter.copy_(1 + 0.2 * normal)
    elif name.endswith("bias"):
      parameter.copy_(0.2 * normal)
    elif "layer_scale" in name or "lambda_" in name:
      parameter.copy_(0.8 + 0.2 * normal)
    elif parameter.ndim >= 2 and not any(part in name for part in ("embed_tokens", "position_embed", "token")):
      gain = 1.6 if any(part in name for part in AMPLIFIED) else 1.0
      parameter.copy_(gain / math.sqrt(parameter[0].numel()) * normal)
    else:
      parameter.copy_(0.5 * normal)
  if model.config.get_text_config().model_type in (
    "gemma",
    "gemma3_text",
  ):  # which add 1 to the weights of norms and scale embeddings
    for name, parameter in model.model.language_model.named_parameters():
      if "norm" in name:
        parameter.sub_(1)
    model.get_input_embeddings().weight.div_(4)
  head = model.get_output_embeddings().weight
  if head is not model.get_input_embeddings().weight:
    head.mul_(3)


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
  """One token per byte of text, so that no question is out of vocabulary."""
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  vocab = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
  tokenizer.post_processor = tokenizers.processors.Sequence(
    [
      tokenizers.processors.ByteLevel(trim_offsets=False),
      tokenizers.processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)]),
    ]
  )
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    bos_token=BOS,
    eos_token=EOS,
    pad_token=PAD,
    extra_special_tokens={"image_token": IMAGE},
    model_max_length=LLAMA["max_position_embeddings"],
  )


def pad_batch(rows: list[tuple[torch.Tensor, torch.Tensor]], num_slots: int, padding: int = 0):
  """Encoded rows as a right-padded `himap_jax.inputs.Inputs` on the host; `padding` is the token id in padding."""
  from himap_jax.inputs import IMAGE as IMAGE_KIND
  from himap_jax.inputs import PADDING, TEXT, Images, Inputs, Layout

  tokens = np.full((len(rows), num_slots), padding, np.int32)
  length = np.array([len(input_ids) for input_ids, _ in rows])[:, None]
  for row, (input_ids, _) in zip(tokens, rows, strict=True):
    row[: len(input_ids)] = input_ids
  used = np.arange(num_slots)[None] < length
  is_image = used & (tokens == SPECIAL_TOKENS.index(IMAGE))
  kind = np.where(used, np.where(is_image, IMAGE_KIND, TEXT), PADDING)
  return Inputs(
    tokens=tokens,
    layout=Layout.of_rows(kind, np.zeros_like(kind), int(is_image.sum(axis=1).max())),
    positions=np.where(used, np.arange(num_slots, dtype=np.int32)[None], 0),
    images=Images(np.stack([pixels.numpy() for _, pixels in rows])),
  )


def noise_image(size: tuple[int, int], seed: int) -> PIL.Image.Image:
  """An RGB image of `size` (width, height) whose colours vary over about a patch."""
  coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
  return PIL.Image.fromarray(coarse).resize(size, PIL.Image.Resampling.BICUBIC)


if __name__ == "__main__":
  make(sys.argv[1], pathlib.Path(sys.argv[2]))
