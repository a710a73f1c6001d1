"""The pruning methods: a table from a name to its stages' scores and its authors' defaults."""

import dataclasses

from himap_jax.schedule import Schedule, Stage
from himap_jax.scoring import Score, image_attention, instruction_attention


@dataclasses.dataclass(frozen=True)
class Method:
  """A pruning method.

  Attributes:
    source: the paper.
    scores: the score of each stage; empty for a method that prunes nothing.
    prune_layers: the authors' default layers, one a stage.
    keep: the authors' default share of the image's tokens that remains after each stage.
  """

  source: str
  scores: tuple[Score, ...]
  prune_layers: tuple[int, ...]
  keep: tuple[float, ...]


METHODS: dict[str, Method] = {
  "none": Method("no pruning", (), (), ()),
  "himap": Method(
    "arXiv 2503.13108, question answering", (instruction_attention, image_attention), (2, 8), (0.5, 0.125)
  ),
}


def build_schedule(
  method: str,
  *,
  num_layers: int,
  num_image_tokens: int,
  prune_layers: tuple[int, ...] | None = None,
  keep: tuple[int | float, ...] | None = None,
) -> Schedule:
  """Builds and checks a method's schedule for a model.

  Args:
    method: a name in `METHODS`.
    num_layers: the decoder's layers.
    num_image_tokens: image tokens before pruning.
    prune_layers: layers to prune before, one a stage; the method's own when None.
    keep: image tokens to keep at each stage, a count (int) or a share of the image's tokens (float in (0, 1], rounded
      to the nearest count, at least one); the method's own when None.

  Raises:
    ValueError: an unknown method, a wrong number of layers or counts, or values that the model cannot run.
  """
  if method not in METHODS:
    raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
  entry = METHODS[method]
  prune_layers = entry.prune_layers if prune_layers is None else prune_layers
  keep = entry.keep if keep is None else keep
  for name, values in (("prune_layers", prune_layers), ("keep", keep)):
    if len(values) != len(entry.scores):
      raise ValueError(f"method {method!r} has {len(entry.scores)} stages, but {name} has {len(values)} values")
  counts = [_count(value, num_image_tokens) for value in keep]
  schedule = Schedule(tuple(Stage(*stage) for stage in zip(prune_layers, counts, entry.scores, strict=True)))
  schedule.segments(num_layers, num_image_tokens)
  return schedule


def _count(keep: int | float, num_image_tokens: int) -> int:
  if isinstance(keep, int):
    return keep
  if not 0 < keep <= 1:
    raise ValueError(f"a share of image tokens to keep must be above 0% and at most 100%, not {keep:.4%}")
  return max(1, round(keep * num_image_tokens))
