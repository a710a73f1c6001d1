"""Cross-attention layers like those of Llama-3.2-Vision, inserted into SmolLM2.

Each starts as a copy of the layer after it, so that its text reads an image token as that layer would read a word with
the same embedding. The copy is not rotated, its queries and keys are normalised, and gates weigh what it adds.

Axes: D model dim, F outputs of a projection.
"""

import re
from typing import Any

import numpy as np

NUM_LAYERS_BETWEEN = 3
ATTENTION_GATE, FEED_FORWARD_GATE = 0.5, 0.1  # their tanh is the share of a layer's output that is added

# What the adapter holds as it is, besides low-rank updates of the other projections.
TRAINED = (
  "cross_attn.k_proj.weight",
  "cross_attn.v_proj.weight",
  "cross_attn.q_norm.weight",
  "cross_attn.k_norm.weight",
  "cross_attn_attn_gate",
  "cross_attn_mlp_gate",
  "input_layernorm.weight",
  "post_attention_layernorm.weight",
)
_LAYER = re.compile(r"layers\.(\d+)\.(.*)")

Tensors = dict[str, np.ndarray]


def insert(language_model: Tensors, text_config: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
  """Inserts a cross-attention layer after the first layer and after every third one that follows.

  Args:
    language_model: LlamaModel names → float32 arrays.
    text_config: of transformers' LlamaConfig.

  Returns:
    MllamaTextModel names → arrays, and the fields of transformers' MllamaTextConfig.
  """
  layers: dict[int, Tensors] = {}
  merged = {}
  for name, value in language_model.items():
    match = _LAYER.fullmatch(name)
    if match:
      layers.setdefault(int(match[1]), {})[match[2]] = value
    else:
      merged[name] = value
  size = float(np.sqrt(np.mean(np.square(language_model["embed_tokens.weight"]))))
  made, cross = [], []
  for index in range(len(layers)):
    if index % NUM_LAYERS_BETWEEN == 1:
      cross.append(len(made))
      made.append(_cross_layer(layers[index], size, text_config["head_dim"]))
    made.append(layers[index])
  merged |= {f"layers.{index}.{name}": value for index, own in enumerate(made) for name, value in own.items()}
  fields = {name: value for name, value in text_config.items() if name not in ("architectures", "head_dim")}
  more = {"model_type": "mllama_text_model", "num_hidden_layers": len(made), "cross_attention_layers": cross}
  return merged, fields | more


def trained(text_config: dict[str, Any]) -> list[str]:
  """The names of `TRAINED` in every cross-attention layer; none for a decoder without them."""
  return [f"layers.{index}.{name}" for index in text_config.get("cross_attention_layers", ()) for name in TRAINED]


def _cross_layer(layer: Tensors, size: float, head_dim: int) -> Tensors:
  """A cross-attention layer from a layer; `size` is the root mean square of the embeddings, which that layer scales."""
  scale = layer["input_layernorm.weight"] / np.float32(size)
  own = {name: value for name, value in layer.items() if not name.startswith("self_attn.")}
  own |= {f"cross_attn.{name}_proj.weight": layer[f"self_attn.{name}_proj.weight"] for name in ("q", "o")}
  own |= {f"cross_attn.{name}_proj.weight": layer[f"self_attn.{name}_proj.weight"] * scale for name in ("k", "v")}
  own |= {f"cross_attn.{name}_norm.weight": np.ones(head_dim, np.float32) for name in ("q", "k")}
  return own | {
    "cross_attn_attn_gate": np.full(1, ATTENTION_GATE, np.float32),
    "cross_attn_mlp_gate": np.full(1, FEED_FORWARD_GATE, np.float32),
  }
