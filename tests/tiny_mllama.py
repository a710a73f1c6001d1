"""A random Llama-3.2-Vision checkpoint as Hugging Face saves it, and HiMAP's pruning of its cross keys in torch."""

import dataclasses
import pathlib

import PIL.Image
import tiny_checkpoints
import tokenizers
import torch
import transformers
from transformers.models.mllama import modeling_mllama

SPECIAL = ("<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>", "<|start_header_id|>", "<|end_header_id|>")
SPECIAL = (*SPECIAL, "<|reserved_0|>", "<|reserved_1|>", "<|reserved_2|>")
VOCAB_SIZE = len(SPECIAL) + 256  # <|image|> is the token after them
SIDE, PATCH, TILES = 28, 7, 4
TOKENS = (SIDE // PATCH) ** 2 + 1  # of a tile
N = TILES * TOKENS  # of a picture
CROSS_LAYERS = (1, 3, 5)
CHAT_TEMPLATE = (
  "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'critic' %}"
  "{{ raise_exception('no critics') }}{% endif %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
  "{% for part in message['content'] %}{% if part['type'] == 'image' %}<|image|>{% else %}{{ part['text'] }}{% endif %}"
  "{% endfor %}<|eot_id|>{% endfor %}"
  "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
VISION = dict(
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=4,
  num_global_layers=2,
  attention_heads=4,
  image_size=SIDE,
  patch_size=PATCH,
  intermediate_layers_indices=[0, 2],
  vision_output_dim=96,
)
TEXT = dict(
  vocab_size=VOCAB_SIZE,
  hidden_size=48,
  intermediate_size=96,
  num_hidden_layers=7,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=512,
  cross_attention_layers=list(CROSS_LAYERS),
  rope_parameters=tiny_checkpoints.LLAMA3_ROPE,
  bos_token_id=0,
  eos_token_id=1,
  pad_token_id=2,
)


@dataclasses.dataclass(frozen=True)
class TinyMllama:
  """A checkpoint on disk and the same model in torch, float32 and eager, with transformers' processor."""

  directory: pathlib.Path
  model: transformers.MllamaForConditionalGeneration
  processor: transformers.MllamaProcessor

  def encode(self, images: list[PIL.Image.Image], prompt: str) -> dict[str, torch.Tensor]:
    """Transformers' own inputs; `prompt` holds one `<|image|>` per picture."""
    return self.processor(images=images or None, text=prompt, return_tensors="pt", add_special_tokens=False)


def make(directory: pathlib.Path) -> TinyMllama:
  config = transformers.MllamaConfig(vision_config=VISION, text_config=TEXT, image_token_index=VOCAB_SIZE)
  config._attn_implementation = "eager"
  model = transformers.MllamaForConditionalGeneration(config).eval()
  tiny_checkpoints.randomize(model, seed=32)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if "tile" in name and name.endswith("embedding.weight"):
        parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
      elif "gate" in name and parameter.shape == (1,):
        parameter.copy_(parameter + parameter.sign())
  model.generation_config = transformers.GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=2)
  model.save_pretrained(directory)
  images = transformers.MllamaImageProcessorPil(size={"height": SIDE, "width": SIDE})
  processor = transformers.MllamaProcessor(images, tokenizer(), chat_template=CHAT_TEMPLATE)
  processor.save_pretrained(directory)
  return TinyMllama(directory, model, processor)


def tokenizer() -> transformers.PreTrainedTokenizerFast:
  """One token per byte of text."""
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  vocab = {token: index for index, token in enumerate((*SPECIAL, *alphabet))}
  own = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
  own.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  own.decoder = tokenizers.decoders.ByteLevel()
  own.add_special_tokens([*SPECIAL, "<|image|>"])
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=own, bos_token=SPECIAL[0], eos_token=SPECIAL[1], pad_token=SPECIAL[2], chat_template=CHAT_TEMPLATE
  )


@dataclasses.dataclass(frozen=True)
class Pruned:
  """A pass over a whole sequence: logits [S, V], the image tokens kept after each stage, the closest decision."""

  logits: torch.Tensor
  kept: list[list[int]]
  margin: float


@torch.no_grad()
def slow_pruned(
  tiny: TinyMllama, batch: dict, stages: dict, answered: list[int], method: str = "instruction_attention"
) -> Pruned:
  """Transformers' layers one by one, with the cross states that a stage drops deleted; `stages` are counts by layer.

  Image tokens are scored by the attention that they receive from the prompt's text after the last picture in the cross
  layer before (`instruction_attention`), or from its last token there (`fastv`) or in the next layer (`pyramiddrop`),
  or by the length of what they add to that token's attention output (`visipruner`); if the kept ones are `given`,
  `stages` holds their indices.
  """
  decoder, ids = tiny.model.model.language_model, batch["input_ids"][0]
  num_prompt, start = len(ids), int((ids == VOCAB_SIZE).nonzero().max()) + 1
  mask = batch["cross_attention_mask"]
  mask = torch.cat([mask, mask[:, -1:].expand(-1, len(answered), -1, -1)], dim=1)
  mask = mask.repeat_interleave(TOKENS, dim=3).flatten(2)  # [1, S, image tokens]
  vision = {name: batch[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
  states = tiny.model.model.vision_model(**vision).last_hidden_state
  states = tiny.model.model.multi_modal_projector(states).reshape(1, -1, TEXT["hidden_size"])
  ids = torch.cat([ids, torch.tensor(answered, dtype=torch.long)])[None]
  x, positions = decoder.embed_tokens(ids), torch.arange(ids.shape[1])[None]
  rotation = decoder.rotary_emb(x, position_ids=positions)
  causal = torch.full((ids.shape[1],) * 2, torch.finfo(torch.float32).min).triu(1)[None, None]
  remaining, kept, margin = torch.arange(states.shape[1]), [], float("inf")
  attention = value = None

  def cross(layer, x, states, mask):
    """The layer's output, its attention by head and its values."""
    cross_mask, full_row = modeling_mllama._prepare_cross_attention_mask(mask[..., None], 1, torch.float32)
    maps, values = [], []
    hooks = [
      layer.cross_attn.register_forward_hook(lambda module, inputs, output: maps.append(output[1])),
      layer.cross_attn.v_proj.register_forward_hook(lambda module, inputs, output: values.append(output)),
    ]
    arguments = dict(cross_attention_states=states, cross_attention_mask=cross_mask, attention_mask=causal)
    y = layer(x, **arguments, full_text_row_masked_out_mask=full_row, position_embeddings=rotation)
    for hook in hooks:
      hook.remove()
    return y, maps[0], values[0]

  for index, layer in enumerate(decoder.layers):
    if index in stages and method == "given":
      chosen = torch.tensor(stages[index])
    elif index in stages:
      if method == "pyramiddrop":
        _, attention, _ = cross(layer, x, states, mask)
      rows = slice(start if method == "instruction_attention" else num_prompt - 1, num_prompt)
      score = attention[0].mean(dim=0)[rows].sum(dim=0)
      if method == "visipruner":
        heads = value[0].unflatten(1, (TEXT["num_key_value_heads"], -1))
        heads = heads.repeat_interleave(TEXT["num_attention_heads"] // TEXT["num_key_value_heads"], dim=1)
        score = torch.einsum("hi,ihd->ihd", attention[0, :, num_prompt - 1], heads).flatten(1).norm(dim=1)
      order = score.argsort(descending=True, stable=True)
      chosen = order[: stages[index]].sort().values
      lowest, next_one = score[order[[stages[index] - 1, stages[index]]]].tolist()
      margin = min(margin, lowest - next_one) if lowest else margin  # of tokens that nobody reads the first stay
    if index in stages:
      states, mask, remaining = states[:, chosen], mask[:, :, chosen], remaining[chosen]
      kept.append(remaining.tolist())
    if index in CROSS_LAYERS:
      x, attention, value = cross(layer, x, states, mask)
    else:
      x = layer(x, attention_mask=causal, position_embeddings=rotation, position_ids=positions)
  return Pruned(tiny.model.lm_head(decoder.norm(x))[0], kept, margin)
