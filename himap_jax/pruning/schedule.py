"""Pruning schedules: the stages between layers, and the static shape of every segment between stages."""

import dataclasses
from collections.abc import Sequence

from himap_jax.errors import UserError
from himap_jax.pruning.method import Criterion


@dataclasses.dataclass(frozen=True)
class Stage:
  """One pruning stage: before `layer` (counted from 0; 0 is before the decoder) it leaves `keep` image tokens."""

  layer: int
  keep: int
  criterion: Criterion


@dataclasses.dataclass(frozen=True)
class Segment:
  """Layers `first` to `last` − 1, which all see the same tokens, and the stage that follows, if any."""

  first: int
  last: int
  num_image_tokens: int
  stage: Stage | None


@dataclasses.dataclass(frozen=True)
class Schedule:
  """Pruning stages, in the order of their layers.

  Attributes:
    frozen_layers: layers that do not update image tokens, ascending.
    parameters: the methods' parameters by name; not part of a schedule's identity, since programs take them as inputs.
  """

  stages: tuple[Stage, ...] = ()
  frozen_layers: tuple[int, ...] = ()
  parameters: tuple[tuple[str, float], ...] = dataclasses.field(default=(), compare=False)

  @property
  def num_caches(self) -> int:
    """Number of segments that have layers."""
    return len(self.stages) + (not self.stages or self.stages[0].layer > 0)

  def with_counts(self, counts: Sequence[int]) -> "Schedule":
    """The same stages with other keep counts, such as those of one row if rows keep different counts."""
    stages = (dataclasses.replace(stage, keep=keep) for stage, keep in zip(self.stages, counts, strict=True))
    return dataclasses.replace(self, stages=tuple(stages))

  def segments(self, num_layers: int, num_image_tokens: int) -> tuple[Segment, ...]:
    """Splits the decoder at the stages; a stage before the decoder makes a first segment without layers.

    Raises:
      UserError: layers are out of range or out of order, or keep counts grow.
    """
    for layer in self.frozen_layers:
      if not 0 <= layer < num_layers:
        raise UserError(f"cannot freeze layer {layer}: the model has layers 0 to {num_layers - 1}")
    if len(set(self.frozen_layers)) < len(self.frozen_layers):
      raise UserError(f"a layer to freeze is named twice: {', '.join(map(str, self.frozen_layers))}")
    segments, first, count = [], 0, num_image_tokens
    for stage in self.stages:
      if not 0 <= stage.layer < num_layers:
        raise UserError(f"cannot prune before layer {stage.layer}: the model has layers 0 to {num_layers - 1}")
      if segments and stage.layer <= first:
        raise UserError(f"pruning layers must ascend, but {stage.layer} follows {first}")
      if not 1 <= stage.keep <= count:
        raise UserError(f"cannot keep {stage.keep} image tokens before layer {stage.layer}: there are {count}")
      segments.append(Segment(first, stage.layer, count, stage))
      first, count = stage.layer, stage.keep
    segments.append(Segment(first, num_layers, count, None))
    return tuple(segments)
