"""Pruning schedules: which layers are preceded by a stage, and the static shape of every segment between stages."""

import dataclasses
from collections.abc import Sequence

from himap_jax.errors import UserError
from himap_jax.pruning.method import Criterion


@dataclasses.dataclass(frozen=True)
class Stage:
  """One pruning stage.

  Attributes:
    layer: the stage acts before this layer, counted from 0; at 0 it acts before the decoder.
    keep: image tokens that remain.
    criterion: which ones, and what is merged into them.
  """

  layer: int
  keep: int
  criterion: Criterion


@dataclasses.dataclass(frozen=True)
class Segment:
  """A range of layers that all see the same tokens.

  Attributes:
    first: its first layer.
    last: one past its last layer.
    num_image_tokens: image tokens in the sequence.
    stage: the stage that follows, or None at the end.
  """

  first: int
  last: int
  num_image_tokens: int
  stage: Stage | None


@dataclasses.dataclass(frozen=True)
class Schedule:
  """What happens to the image tokens.

  Attributes:
    stages: pruning stages in the order of their layers; no stages, no pruning.
    frozen_layers: layers that do not update image tokens, in ascending order.
    parameters: the methods' parameters by name; no part of a schedule's identity, since programs take them as inputs.
  """

  stages: tuple[Stage, ...] = ()
  frozen_layers: tuple[int, ...] = ()
  parameters: tuple[tuple[str, float], ...] = dataclasses.field(default=(), compare=False)

  @property
  def num_caches(self) -> int:
    """Segments that have layers."""
    return len(self.stages) + (not self.stages or self.stages[0].layer > 0)

  def with_counts(self, counts: Sequence[int]) -> "Schedule":
    """The same stages with other keep counts, such as those of one row where rows keep different counts."""
    stages = (dataclasses.replace(stage, keep=keep) for stage, keep in zip(self.stages, counts, strict=True))
    return dataclasses.replace(self, stages=tuple(stages))

  def segments(self, num_layers: int, num_image_tokens: int) -> tuple[Segment, ...]:
    """Cuts the decoder at the stages; a stage before the decoder makes a first segment without layers.

    Raises:
      UserError: stages that the model cannot run: layers out of range or out of order, counts that grow.
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
