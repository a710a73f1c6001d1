"""A random Qwen-VL checkpoint in the authors' layout, and the model written slowly in torch from its description."""

import base64
import dataclasses
import json
import math
import pathlib

import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

HIDDEN, HEADS, LAYERS, FEED_FORWARD = 256, 4, 4, 96
WIDTH, TOWER_HEADS, TOWER_LAYERS, PATCH, SIDE = 32, 4, 3, 7, 42
NUM_QUERIES, NUM_SPECIAL = 16, 214  # 214 special tokens up to <img>
MERGES = (b"Pi", b"ct", b"Pict", b"ur", b"ure", b"Wh")


@dataclasses.dataclass(frozen=True)
class TinyQwen:
  """A checkpoint on disk and the same model in torch.

  Attributes:
    language_model: transformers' Qwen2ForCausalLM with the decoder's weights.
    visual: tower and resampler.
    image_id: the token of image slots.
  """

  directory: pathlib.Path
  language_model: transformers.Qwen2ForCausalLM
  visual: nn.Module
  image_id: int

  @torch.no_grad()
  def logits(self, input_ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """`[S, V]` logits of one prompt, whose image slots hold `image_id`."""
    return self.language_model(inputs_embeds=self.embed(input_ids, pixels)[None]).logits[0]

  @torch.no_grad()
  def embed(self, input_ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    x = self.language_model.get_input_embeddings()(input_ids).clone()
    x[input_ids == self.image_id] = self.visual(pixels).flatten(0, 1)
    return x


class Block(nn.Module):
  """A layer of the tower, whose fused projection has a query, a key and a value for each head in turn."""

  def __init__(self):
    super().__init__()
    self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH, eps=1e-6), nn.LayerNorm(WIDTH, eps=1e-6)
    self.attn = nn.ModuleDict({"in_proj": nn.Linear(WIDTH, 3 * WIDTH), "out_proj": nn.Linear(WIDTH, WIDTH)})
    self.mlp = nn.ModuleDict({"c_fc": nn.Linear(WIDTH, 80), "c_proj": nn.Linear(80, WIDTH)})

  def forward(self, x):
    dim, heads = WIDTH // TOWER_HEADS, []
    for head in self.attn["in_proj"](self.ln_1(x)).split(3 * dim, dim=-1):
      query, key, value = head.split(dim, dim=-1)
      heads.append((query @ key.transpose(1, 2) / math.sqrt(dim)).softmax(dim=-1) @ value)
    x = x + self.attn["out_proj"](torch.cat(heads, dim=-1))
    return x + self.mlp["c_proj"](functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


class Visual(nn.Module):
  """Tower and resampler, with the names of the authors' checkpoint."""

  def __init__(self):
    super().__init__()
    self.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
    self.positional_embedding = nn.Parameter(torch.zeros(256, WIDTH))
    self.ln_pre = nn.LayerNorm(WIDTH, eps=1e-6)
    self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(Block() for _ in range(TOWER_LAYERS))})
    self.attn_pool = nn.ParameterDict(
      {
        "query": nn.Parameter(torch.zeros(NUM_QUERIES, HIDDEN)),
        "pos_embed": nn.Parameter(torch.zeros(NUM_QUERIES, HIDDEN)),
      }
    )
    self.attn_pool.kv_proj = nn.Linear(WIDTH, HIDDEN, bias=False)
    self.attn_pool.attn = nn.MultiheadAttention(HIDDEN, HIDDEN // 128, batch_first=True)
    self.attn_pool.ln_q, self.attn_pool.ln_kv = nn.LayerNorm(HIDDEN, eps=1e-6), nn.LayerNorm(HIDDEN, eps=1e-6)
    self.ln_post = nn.LayerNorm(HIDDEN, eps=1e-6)
    self.proj = nn.Parameter(torch.zeros(HIDDEN, HIDDEN))

  def forward(self, pixels):
    x = self.conv1(pixels).flatten(2).transpose(1, 2)
    side = pixels.shape[-1] // PATCH
    x = self.ln_pre(x + resized(self.positional_embedding, side))
    for block in self.transformer["resblocks"]:
      x = block(x)
    pool = self.attn_pool
    x = pool.ln_kv(pool.kv_proj(x))
    query = (pool.ln_q(pool["query"]) + pool["pos_embed"]).expand(len(x), -1, -1)
    x, _ = pool.attn(query, x + resized(pool["pos_embed"], side), x)
    return self.ln_post(x) @ self.proj


def resized(grid, side):
  """A square grid of position embeddings, resized."""
  old = round(len(grid) ** 0.5)
  image = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2)
  return functional.interpolate(image, (side, side), mode="bicubic", align_corners=False).flatten(2)[0].T


def make(directory: pathlib.Path, **fields) -> TinyQwen:
  """Draws the checkpoint and saves it as Qwen/Qwen-VL-Chat is published, but as safetensors."""
  generator = torch.Generator().manual_seed(7)
  tokens = [bytes([byte]) for byte in range(256)] + list(MERGES)
  ranks = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
  (directory / "qwen.tiktoken").write_text(ranks)
  image_start = len(tokens) + NUM_SPECIAL
  vocab_size = image_start + 16
  config = transformers.Qwen2Config(
    vocab_size=vocab_size,
    hidden_size=HIDDEN,
    intermediate_size=FEED_FORWARD,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=HEADS,
    rms_norm_eps=1e-6,
    rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    tie_word_embeddings=False,
  )
  config._attn_implementation = "eager"
  language_model, visual = transformers.Qwen2ForCausalLM(config).eval(), Visual().eval()
  for model in (language_model, visual):
    for name, parameter in model.named_parameters():
      _redraw(name, parameter, generator)
  save_file(authors_names(language_model, visual), directory / "model.safetensors", metadata={"format": "pt"})
  (directory / "config.json").write_text(
    json.dumps(
      {
        "model_type": "qwen",
        "architectures": ["QWenLMHeadModel"],
        "auto_map": {
          "AutoConfig": "configuration_qwen.QWenConfig",
          "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
        },
        "vocab_size": vocab_size,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * FEED_FORWARD,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "kv_channels": HIDDEN // HEADS,
        "layer_norm_epsilon": 1e-6,
        "seq_length": 512,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "visual": {"heads": TOWER_HEADS, "image_size": SIDE, "image_start_id": image_start, "layers": TOWER_LAYERS}
        | {"mlp_ratio": 2.5, "output_dim": HIDDEN, "patch_size": PATCH, "width": WIDTH, "n_queries": NUM_QUERIES},
      }
      | fields
    )
  )
  (directory / "generation_config.json").write_text(json.dumps({"chat_format": "chatml", "eos_token_id": len(tokens)}))
  return TinyQwen(directory, language_model, visual, image_start + 2)


@torch.no_grad()
def _redraw(name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
  normal = torch.randn(parameter.shape, generator=generator)
  if ("norm" in name or "ln_" in name) and name.endswith("weight"):
    parameter.copy_(1 + 0.2 * normal)
  elif parameter.ndim < 2:
    parameter.copy_(0.2 * normal)
  elif any(part in name for part in ("embed", "query")):
    parameter.copy_(0.5 * normal)
  else:
    gain = 1.6 if any(part in name for part in ("q_proj", "k_proj", "in_proj", "o_proj", "down_proj")) else 1.0
    parameter.copy_(gain / math.sqrt(parameter[0].numel()) * normal)


def authors_names(language_model: nn.Module, visual: nn.Module) -> dict[str, torch.Tensor]:
  """The tensors of the published checkpoint."""
  renamed = {
    "model.embed_tokens.": "wte.",
    "model.norm.": "ln_f.",
    "model.layers.": "h.",
    "input_layernorm.": "ln_1.",
    "post_attention_layernorm.": "ln_2.",
    "self_attn.o_proj.": "attn.c_proj.",
    "mlp.up_proj.": "mlp.w1.",
    "mlp.gate_proj.": "mlp.w2.",
    "mlp.down_proj.": "mlp.c_proj.",
  }
  stored, tensors = dict(language_model.named_parameters()), {}
  for name in list(stored):
    if ".q_proj." in name:
      parts = [stored.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
      stored[name.replace("self_attn.q_proj.", "attn.c_attn.")] = torch.cat(parts)
  for name, tensor in stored.items():
    for ours, theirs in renamed.items():
      name = name.replace(ours, theirs)
    tensors[name if name.startswith("lm_head") else f"transformer.{name}"] = tensor
  tensors |= {f"transformer.visual.{name}": tensor for name, tensor in visual.named_parameters()}
  tensors["transformer.rotary_emb.inv_freq"] = torch.zeros(4)
  return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
