"""Maps tensor names to the parameter tree: a table for each model type, and a check of all names and shapes.

The tree keeps the checkpoint's names with dots as levels, except that `layers.N` becomes one level, `layers_N`.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from checkpoints_convert import transforms
from checkpoints_convert.errors import CheckpointError
from checkpoints_convert.messages import some
from checkpoints_convert.stored import FLOAT_DTYPES, Index, StoredTensor

# Path of a parameter in the tree.
Path = tuple[str, ...]


class Entry(NamedTuple):
  """Maps tensors to parameters.

  Attributes:
    pattern: regular expression for the start of their names.
    place: replacement of that start in the tree.
    transform: makes the parameter from the stored tensor and the fields of config.json, with array methods and slices;
      may raise `transforms.UnfitShape`. None for the tensor itself.
  """

  pattern: str
  place: str
  transform: transforms.Transform | None = None


class Table(NamedTuple):
  """The tensor names of one model type's checkpoints.

  Attributes:
    entries: the first that matches a name applies; entries with the same pattern make several parameters of one tensor.
    unused: regular expression of stored paths, with levels separated by `/`, that the model does not read.
    tower_layer: regular expression of the tower's layers, with the number as its group; the model may need fewer.
  """

  entries: tuple[Entry, ...]
  unused: str
  tower_layer: str


def _renamed(start: str, place: str, modules: Mapping[str, str]) -> tuple[Entry, ...]:
  """Entries for the modules after `start`, which are the values of `modules` in the tree at `place`."""
  return tuple(Entry(start + pattern, place + own) for pattern, own in modules.items())


def _fused(
  pattern: str,
  place: str,
  transform: Callable[[int], transforms.Transform],
  parts: Sequence[str] = transforms.PROJECTIONS,
) -> tuple[Entry, ...]:
  """Entries for a fused module and the modules that it holds, in the tree at `place`."""
  return tuple(Entry(pattern, f"{place}{part}.", transform(index)) for index, part in enumerate(parts))


# InternViT as its authors publish it, alone or within LLaVA's original layout; rows of `qkv` are queries, keys, values.
_INTERNVIT = r"(?:model\.vision_tower\.vision_tower\.)?"
_INTERNVIT_LAYER, _INTERNVIT_PLACE = _INTERNVIT + r"encoder\.layers\.(\d+)\.", r"vision_tower.encoder.layer.\1."
_INTERNVIT_NAMES = {
  r"norm1\.": "layernorm_before.",
  r"norm2\.": "layernorm_after.",
  r"ls1$": "lambda_1",
  r"ls2$": "lambda_2",
  r"attn\.proj\.": "attention.projection_layer.",
  r"attn\.(?=[qk]_norm\.)": "attention.",
  r"mlp\.": "mlp.",
}
_INTERNVIT_ENTRIES = (
  Entry(_INTERNVIT + r"embeddings\.class_embedding$", "vision_tower.embeddings.cls_token"),
  Entry(_INTERNVIT + r"embeddings\.position_embedding$", "vision_tower.embeddings.position_embeddings"),
  Entry(_INTERNVIT + r"embeddings\.patch_embedding\.", "vision_tower.embeddings.patch_embeddings.projection."),
  *_fused(
    _INTERNVIT_LAYER + r"attn\.qkv\.",
    _INTERNVIT_PLACE + "attention.",
    transforms.thirds("vision_config", "hidden_size"),
  ),
  *_renamed(_INTERNVIT_LAYER, _INTERNVIT_PLACE, _INTERNVIT_NAMES),
)

_QWEN_LAYER, _QWEN_PLACE = r"transformer\.h\.(\d+)\.", r"language_model.layers.\1."
_QWEN_LAYER_NAMES = {
  r"ln_1\.": "input_layernorm.",
  r"ln_2\.": "post_attention_layernorm.",
  r"attn\.c_proj\.": "self_attn.o_proj.",
  r"mlp\.w1\.": "mlp.up_proj.",
  r"mlp\.w2\.": "mlp.gate_proj.",
  r"mlp\.c_proj\.": "mlp.down_proj.",
}
_QWEN_TOWER = r"transformer\.visual\."
_QWEN_TOWER_LAYER = _QWEN_TOWER + r"transformer\.resblocks\.(\d+)\."
_QWEN_TOWER_PLACE = r"vision_tower.encoder.layers.\1."
_QWEN_TOWER_NAMES = {
  r"ln_1\.": "layer_norm1.",
  r"ln_2\.": "layer_norm2.",
  r"attn\.out_proj\.": "self_attn.out_proj.",
  r"mlp\.c_fc\.": "mlp.fc1.",
  r"mlp\.c_proj\.": "mlp.fc2.",
}
_QWEN_THIRDS = transforms.thirds("hidden_size")

# The start of the fused modules in a decoder layer of Phi-3, in any of LLaVA's layouts.
_PHI3_LAYER, _PHI3_PLACE = (
  r"(?:language_model\.model|model\.language_model|model)\.(layers\.\d+)\.",
  r"language_model.\1.",
)

# Hugging Face's names of LLaVA and the families after it: without `model.` before transformers 4.52, with it since.
_HUGGING_FACE_ENTRIES = (
  Entry(r"(model\.)?vision_tower\.(vision_model\.)?", "vision_tower."),
  Entry(r"(model\.)?multi_modal_projector\.", "multi_modal_projector."),
  Entry(r"(model\.)?image_newline$", "image_newline"),
  Entry(r"language_model\.lm_head\.", "lm_head."),
  Entry(r"language_model\.model\.", "language_model."),
  Entry(r"model\.language_model\.", "language_model."),
)

_LLAVA = Table(
  entries=(
    # the fused decoder layers of Phi-3
    *_fused(_PHI3_LAYER + r"self_attn\.qkv_proj\.", _PHI3_PLACE + "self_attn.", transforms.qkv),
    *_fused(_PHI3_LAYER + r"mlp\.gate_up_proj\.", _PHI3_PLACE + "mlp.", transforms.gate_up, ("gate_proj", "up_proj")),
    # LLaVA's original layout
    Entry(r"model\.vision_tower\.vision_tower\.(vision_model\.)?", "vision_tower."),
    Entry(r"model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
    Entry(r"model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    *_HUGGING_FACE_ENTRIES,
    # the decoder of the original layout
    Entry(r"model\.(?=layers\.|embed_tokens\.|norm\.)", "language_model."),
  ),
  unused=(
    r"vision_tower/(post_layernorm|layernorm|head)/|vision_tower/embeddings/mask_token$|"
    r".*(^|/)(inv_freq|position_ids)$|"
    r"lm_head/weight$|"  # of a tied head
    r"vision_tower/(text_model/|(visual|text)_projection/|logit_(scale|bias)$)"  # the rest of a CLIP model
  ),
  tower_layer=r"vision_tower/encoder/layers?_(\d+)/",
)

_IDEFICS3 = Table(
  entries=(
    Entry(r"model\.vision_model\.", "vision_tower."),
    Entry(r"model\.connector\.modality_projection\.proj\.", "multi_modal_projector.linear."),
    Entry(r"model\.text_model\.", "language_model."),
  ),
  unused=r".*(^|/)(inv_freq|position_ids)$",
  tower_layer=r"vision_tower/encoder/layers_(\d+)/",
)
# Qwen2-VL to Qwen3-VL, with `model.` in newer checkpoints.
_VISUAL = r"(?:model\.)?visual\."
_BLOCK, _BLOCK_PLACE = _VISUAL + r"blocks\.(\d+)\.", r"vision_tower.layers.\1."


def _qwen_vl(width: str) -> Table:
  """The names of Qwen2-VL to Qwen3-VL, whose `vision_config` gives the tower's width as `width`."""
  return Table(
    entries=(
      Entry(_VISUAL + r"patch_embed\.proj\.weight$", "vision_tower.patch_embed.weight", transforms.of_stills),
      Entry(_VISUAL + r"patch_embed\.proj\.", "vision_tower.patch_embed."),
      Entry(_VISUAL + r"pos_embed\.", "vision_tower.embeddings.pos_embed."),
      *_fused(_BLOCK + r"attn\.qkv\.", _BLOCK_PLACE + "attn.", transforms.thirds("vision_config", width)),
      Entry(_BLOCK + r"(mlp\.)?(?:linear_)?", _BLOCK_PLACE + r"\2"),
      Entry(_VISUAL + r"merger\.(?:ln_q|norm)\.", "multi_modal_projector.norm."),
      Entry(_VISUAL + r"merger\.(?:mlp\.0|linear_fc1)\.", "multi_modal_projector.linear_1."),
      Entry(_VISUAL + r"merger\.(?:mlp\.2|linear_fc2)\.", "multi_modal_projector.linear_2."),
      Entry(_VISUAL + r"deepstack_merger_list\.(\d+)\.linear_fc", r"deepstack_mergers_\1.linear_"),
      Entry(_VISUAL + r"deepstack_merger_list\.(\d+)\.", r"deepstack_mergers_\1."),
      Entry(r"model\.(?:language_model\.)?", "language_model."),
    ),
    unused=r".*(^|/)inv_freq$|lm_head/weight$",  # of a tied head
    tower_layer=r"vision_tower/layers_(\d+)/",
  )


# By `model_type` of config.json.
TABLES = {
  "llava": _LLAVA,
  "llava_cross": _LLAVA,
  "llava_next": _LLAVA,
  "llava_onevision": _LLAVA,
  "internvl": Table(
    entries=_HUGGING_FACE_ENTRIES,
    unused=r"vision_tower/(layernorm/|embeddings/mask_token$)|.*(^|/)(inv_freq|position_ids)$",
    tower_layer=r"vision_tower/encoder/layer_(\d+)/",
  ),
  "idefics3": _IDEFICS3,
  "smolvlm": _IDEFICS3,
  "mllama": Table(
    entries=(
      Entry(r"(model\.)?vision_model\.", "vision_tower."),
      Entry(r"(model\.)?multi_modal_projector\.", "multi_modal_projector.linear."),
      Entry(r"language_model\.lm_head\.", "lm_head."),
      Entry(r"language_model\.model\.", "language_model."),
      Entry(r"model\.language_model\.", "language_model."),
    ),
    unused=r".*(^|/)inv_freq$",
    tower_layer=r"(?!)",
  ),
  "qwen": Table(
    entries=(
      *_renamed(_QWEN_LAYER, _QWEN_PLACE, _QWEN_LAYER_NAMES),
      *_fused(_QWEN_LAYER + r"attn\.c_attn\.", _QWEN_PLACE + "self_attn.", _QWEN_THIRDS),
      Entry(r"transformer\.wte\.", "language_model.embed_tokens."),
      Entry(r"transformer\.ln_f\.", "language_model.norm."),
      Entry(_QWEN_TOWER + r"conv1\.", "vision_tower.embeddings.patch_embedding."),
      Entry(_QWEN_TOWER + r"positional_embedding$", "vision_tower.embeddings.position_embedding.weight"),
      Entry(_QWEN_TOWER + r"ln_pre\.", "vision_tower.pre_layrnorm."),
      *_renamed(_QWEN_TOWER_LAYER, _QWEN_TOWER_PLACE, _QWEN_TOWER_NAMES),
      *_fused(_QWEN_TOWER_LAYER + r"attn\.in_proj\.", _QWEN_TOWER_PLACE + "self_attn.", transforms.qkv_of_heads),
      *_fused(_QWEN_TOWER + r"attn_pool\.attn\.in_proj_", "multi_modal_projector.attn.", _QWEN_THIRDS),
      Entry(_QWEN_TOWER + r"attn_pool\.", "multi_modal_projector."),
      Entry(_QWEN_TOWER + r"ln_post\.", "multi_modal_projector.ln_post."),
      Entry(_QWEN_TOWER + r"proj$", "multi_modal_projector.proj.weight", transforms.transposed),
    ),
    unused=r".*(^|/)(inv_freq|masked_bias|logn_tensor)$",
    tower_layer=r"vision_tower/encoder/layers_(\d+)/",
  ),
  "qwen2_vl": _qwen_vl("embed_dim"),
  "qwen2_5_vl": _qwen_vl("hidden_size"),
  "qwen3_vl": _qwen_vl("hidden_size"),
  "gemma3": Table(
    entries=(
      Entry(
        r"(model\.)?multi_modal_projector\.mm_input_projection_weight$",
        "multi_modal_projector.mm_input_projection.weight",
        transforms.transposed,
      ),
      *_HUGGING_FACE_ENTRIES,
    ),
    unused=r".*(^|/)(inv_freq|position_ids)$|lm_head/weight$|vision_tower/head/",
    tower_layer=r"vision_tower/encoder/layers_(\d+)/",
  ),
}
# The towers of LLaVA's original layout, in the checkpoint or in one of their own, by the `model_type` of the latter.
_CLIP_ENTRIES = (Entry(r"(model\.vision_tower\.vision_tower\.)?vision_model\.", "vision_tower."),)
TOWER_ENTRIES = {
  "clip": _CLIP_ENTRIES,
  "clip_vision_model": _CLIP_ENTRIES,
  "intern_vit_6b": _INTERNVIT_ENTRIES,
}

_LAYER = re.compile(r"\b(layers?)\.(\d+)\.")


@dataclasses.dataclass(frozen=True)
class ExpectedModel:
  """The model that a checkpoint must hold.

  Attributes:
    fields: a complete config.json; `model_type` is a key of `TABLES`.
    shapes: shapes of the parameters that the model reads, by path.
    num_tower_layers: layers of the whole tower; a checkpoint may hold those above the last that the model runs.
    int8: parameters that can be int8.
  """

  fields: dict[str, Any]
  shapes: Mapping[Path, tuple[int, ...]]
  num_tower_layers: int
  int8: frozenset[Path]


class Parameter(NamedTuple):
  """A parameter in a checkpoint: its path in the tree, its stored tensor and the transform between them."""

  path: Path
  tensor: StoredTensor
  transform: Callable[[np.ndarray], np.ndarray] | None = None

  @property
  def shape(self) -> tuple[int, ...]:
    shape = self.tensor.shape
    return shape if self.transform is None else self.transform(np.broadcast_to(np.int8(0), shape)).shape

  def reader(self) -> Callable[[Index], np.ndarray]:
    """A function that reads the part an index names, in the stored dtype; a transform reads the whole tensor."""
    read = self.tensor.reader()
    return read if self.transform is None else self.transform(read(...)).__getitem__


class Plan(NamedTuple):
  """The parameters to read, in their order on disk, and the names that the model does not read."""

  parameters: tuple[Parameter, ...]
  unused: tuple[str, ...]


def place_names(
  tensors: Iterable[StoredTensor], entries: tuple[Entry, ...], fields: Mapping[str, Any]
) -> list[Parameter]:
  """Maps stored tensors to parameters by name; `fields` of config.json are for transforms."""
  entries = (*entries, Entry("", ""))
  placed = []
  for tensor in tensors:
    pattern = next(entry.pattern for entry in entries if re.match(entry.pattern, tensor.name))
    for entry in entries:
      if entry.pattern == pattern:
        name = re.sub(pattern, entry.place, tensor.name, count=1)
        transform = entry.transform and functools.partial(entry.transform, fields=fields)
        placed.append(Parameter(tuple(_LAYER.sub(r"\1_\2.", name).split(".")), tensor, transform))
  return placed


def plan(stored: Iterable[Parameter], model: ExpectedModel, where: str) -> Plan:
  """Matches stored parameters with those that the model reads.

  Args:
    stored: result of `place_names`.
    model: the model to match.
    where: name of the checkpoint in messages.

  Raises:
    CheckpointError: missing, unexpected or repeated names, or unfit shapes or dtypes; the message lists the first of
      each kind and counts all.
  """
  expected = model.shapes
  found: dict[Path, Parameter] = {}
  unused, unexpected, repeated, misshaped, mistyped = [], [], [], [], []
  for parameter in stored:
    path, tensor = parameter.path, parameter.tensor
    if path not in expected:
      (unused if _is_unused("/".join(path), model) else unexpected).append(tensor.name)
    elif path in found:
      repeated.append(f"{tensor.name} and {found[path].tensor.name}")
    elif misfit := _misfit(parameter, expected[path]):
      misshaped.append(misfit)
    elif tensor.dtype not in FLOAT_DTYPES:
      mistyped.append(f"{tensor.name} is {tensor.dtype}")
    found.setdefault(path, parameter)
  problems = {
    "missing": [".".join(path) for path in expected if path not in found],
    "unexpected": unexpected,
    "stored twice": repeated,
    "mis-shaped": misshaped,
    f"of a dtype other than {', '.join(FLOAT_DTYPES)}": mistyped,
  }
  problems = {kind: list(dict.fromkeys(names)) for kind, names in problems.items()}  # parts of one tensor say the same
  if any(problems.values()):
    report = "; ".join(f"{len(names)} {kind} ({some(names)})" for kind, names in problems.items() if names)
    raise CheckpointError(
      f"{where}: the weights are not those of the model that config.json describes: {report}; "
      f"{len(found.keys() & expected.keys())} of {len(expected)} names match, {len(unused)} unused"
    )
  return Plan(tuple(parameter for path, parameter in found.items() if path in expected), tuple(unused))


def _misfit(parameter: Parameter, expected: tuple[int, ...]) -> str:
  """How a parameter's shape differs from the expected; empty if it does not."""
  tensor = parameter.tensor
  try:
    shape = parameter.shape
  except transforms.UnfitShape as error:
    return f"{tensor.name} is {list(tensor.shape)}, expected {list(error.expected)}"
  if shape == expected:
    return ""
  read_as = f", read as {list(shape)}" if parameter.transform else ""
  return f"{tensor.name} is {list(tensor.shape)}{read_as}, expected {list(expected)}"


def _is_unused(path: str, model: ExpectedModel) -> bool:
  table = TABLES[model.fields["model_type"]]
  if layer := re.match(table.tower_layer, path):
    is_run = any("/".join(expected).startswith(layer[0]) for expected in model.shapes)
    return not is_run and int(layer[1]) < model.num_tower_layers
  return re.match(table.unused, path) is not None
