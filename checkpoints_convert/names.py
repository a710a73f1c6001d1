"""From the names of a checkpoint to the parameter tree: renaming, and the check of every name and shape.

The tree keeps the checkpoint's names, dots becoming levels, except that `layers.N` is one level, `layers_N`.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from flax import traverse_util

from checkpoints_convert.safetensors_reader import FLOAT_DTYPES, StoredTensor, some
from himap_jax.config import LlavaConfig

Path = tuple[str, ...]

_PREFIXES = tuple(
  (re.compile(pattern), replacement)
  for pattern, replacement in (
    # LLaVA's original layout
    (r"model\.vision_tower\.vision_tower\.(vision_model\.)?", "vision_tower."),
    (r"model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
    (r"model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    # Hugging Face: without `model.` before transformers 4.52, with it since
    (r"(model\.)?vision_tower\.(vision_model\.)?", "vision_tower."),
    (r"(model\.)?multi_modal_projector\.", "multi_modal_projector."),
    (r"language_model\.lm_head\.", "lm_head."),
    (r"language_model\.model\.", "language_model."),
    (r"model\.language_model\.", "language_model."),
    # the decoder of the original layout
    (r"model\.(?=layers\.|embed_tokens\.|norm\.)", "language_model."),
  )
)
_TOWER_PREFIX = re.compile(r"(vision_model\.|dinov2\.)?")
_LAYER = re.compile(r"\b(layers?)\.(\d+)\.")
_TOWER_LAYER = re.compile(r"vision_tower/encoder/layers?_(\d+)/")
_NEVER_USED = re.compile(
  r"vision_tower/(post_layernorm|layernorm|head)/|vision_tower/embeddings/mask_token$|"
  r".*(^|/)(inv_freq|position_ids)$"
)
_REST_OF_CLIP = re.compile(r"text_model\.|(visual|text)_projection\.|logit_(scale|bias)$")


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a conversion writes.

  Attributes:
    tensors: the path in the tree of each stored tensor, in the order in which they lie on disk.
    unused: names in the checkpoint that the model never reads.
  """

  tensors: tuple[tuple[Path, StoredTensor], ...]
  unused: tuple[str, ...]

  @property
  def num_bytes(self) -> int:
    return sum(tensor.num_bytes for _, tensor in self.tensors)

  @property
  def dtypes(self) -> tuple[str, ...]:
    return tuple(sorted({FLOAT_DTYPES[tensor.dtype].name for _, tensor in self.tensors}))


def tree_path(name: str) -> Path:
  """The place in the parameter tree of a name in a LLaVA checkpoint of any of the three layouts."""
  for pattern, replacement in _PREFIXES:
    if match := pattern.match(name):
      name = replacement + name[match.end() :]
      break
  return _split(name)


def tower_path(name: str) -> Path | None:
  """The place of a name in a vision tower's own checkpoint; None for what is no part of the tower."""
  if _REST_OF_CLIP.match(name):
    return None
  return _split("vision_tower." + name[_TOWER_PREFIX.match(name).end() :])


def plan(
  stored: Iterable[tuple[Path | None, StoredTensor]], abstract: Mapping[str, Any], config: LlavaConfig, where: str
) -> Plan:
  """Matches stored tensors with the abstract parameter tree.

  Args:
    stored: tensors and their places in the tree.
    abstract: nested dict whose leaves have a `shape`.
    config: the model.
    where: names the checkpoint in messages.

  Raises:
    ValueError: names that are missing, unexpected or stored twice, shapes or dtypes that do not fit; it lists the
      first of each kind and counts all.
  """
  expected = {path: tuple(leaf.shape) for path, leaf in traverse_util.flatten_dict(dict(abstract)).items()}
  found: dict[Path, StoredTensor] = {}
  unused, unexpected, repeated, misshaped, mistyped = [], [], [], [], []
  for path, tensor in stored:
    if path not in expected:
      (unused if path is None or _is_unused("/".join(path), config) else unexpected).append(tensor.name)
    elif path in found:
      repeated.append(f"{tensor.name} and {found[path].name}")
    elif tensor.shape != expected[path]:
      misshaped.append(f"{tensor.name} is {list(tensor.shape)}, expected {list(expected[path])}")
    elif tensor.dtype not in FLOAT_DTYPES:
      mistyped.append(f"{tensor.name} is {tensor.dtype}")
    found.setdefault(path, tensor)
  problems = {
    "missing": [".".join(path) for path in expected if path not in found],
    "unexpected": unexpected,
    "stored twice": repeated,
    "mis-shaped": misshaped,
    f"of a dtype other than {', '.join(FLOAT_DTYPES)}": mistyped,
  }
  if any(problems.values()):
    report = "; ".join(f"{len(names)} {kind} ({some(names)})" for kind, names in problems.items() if names)
    raise ValueError(
      f"{where}: the weights are not those of the model that config.json describes: {report}; "
      f"{len(found.keys() & expected.keys())} of {len(expected)} names match, {len(unused)} unused"
    )
  tensors = tuple((path, tensor) for path, tensor in found.items() if path in expected)
  return Plan(tensors, tuple(unused))


def _split(name: str) -> Path:
  return tuple(_LAYER.sub(r"\1_\2.", name).split("."))


def _is_unused(path: str, config: LlavaConfig) -> bool:
  if layer := _TOWER_LAYER.match(path):
    return max(config.vision_feature_layers) <= int(layer[1]) < config.vision.num_hidden_layers
  if path == "lm_head/weight":
    return config.text.tie_word_embeddings
  return _NEVER_USED.match(path) is not None
