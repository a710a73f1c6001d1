"""Maps tensor names to the parameter tree: a table for each model type, and a check of all names and shapes.

The tree keeps the checkpoint's names with dots as levels, except that `layers.N` becomes one level, `layers_N`.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from checkpoints_convert.errors import CheckpointError
from checkpoints_convert.source import some
from checkpoints_convert.stored import FLOAT_DTYPES, Index, StoredTensor

# Path of a parameter in the tree.
Path = tuple[str, ...]


class Entry(NamedTuple):
  """Maps tensors to parameters.

  Attributes:
    pattern: regular expression for the start of their names.
    place: replacement of that start in the tree.
    transform: makes the parameter from the stored tensor with array methods and slices; None for the tensor itself.
  """

  pattern: str
  place: str
  transform: Callable[[np.ndarray], np.ndarray] | None = None


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


# By `model_type` of config.json.
TABLES = {
  "llava": Table(
    entries=(
      # LLaVA's original layout
      Entry(r"model\.vision_tower\.vision_tower\.(vision_model\.)?", "vision_tower."),
      Entry(r"model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
      Entry(r"model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
      # Hugging Face: without `model.` before transformers 4.52, with it since
      Entry(r"(model\.)?vision_tower\.(vision_model\.)?", "vision_tower."),
      Entry(r"(model\.)?multi_modal_projector\.", "multi_modal_projector."),
      Entry(r"language_model\.lm_head\.", "lm_head."),
      Entry(r"language_model\.model\.", "language_model."),
      Entry(r"model\.language_model\.", "language_model."),
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
}
# For the vision tower's own checkpoint, to which LLaVA's original layout refers.
TOWER_ENTRIES = (Entry(r"(vision_model\.|dinov2\.)?", "vision_tower."),)

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


def place_names(tensors: Iterable[StoredTensor], entries: tuple[Entry, ...]) -> list[Parameter]:
  """Maps stored tensors to parameters by name."""
  entries = (*entries, Entry("", ""))
  placed = []
  for tensor in tensors:
    pattern = next(entry.pattern for entry in entries if re.match(entry.pattern, tensor.name))
    for entry in entries:
      if entry.pattern == pattern:
        name = re.sub(pattern, entry.place, tensor.name, count=1)
        placed.append(Parameter(tuple(_LAYER.sub(r"\1_\2.", name).split(".")), tensor, entry.transform))
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
    elif parameter.shape != expected[path]:
      misshaped.append(f"{tensor.name} is {list(parameter.shape)}, expected {list(expected[path])}")
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
  if any(problems.values()):
    report = "; ".join(f"{len(names)} {kind} ({some(names)})" for kind, names in problems.items() if names)
    raise CheckpointError(
      f"{where}: the weights are not those of the model that config.json describes: {report}; "
      f"{len(found.keys() & expected.keys())} of {len(expected)} names match, {len(unused)} unused"
    )
  return Plan(tuple(parameter for path, parameter in found.items() if path in expected), tuple(unused))


def _is_unused(path: str, model: ExpectedModel) -> bool:
  table = TABLES[model.fields["model_type"]]
  if layer := re.match(table.tower_layer, path):
    is_run = any("/".join(expected).startswith(layer[0]) for expected in model.shapes)
    return not is_run and int(layer[1]) < model.num_tower_layers
  return re.match(table.unused, path) is not None
