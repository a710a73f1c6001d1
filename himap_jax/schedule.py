"""Pruning schedules: which layers are preceded by a stage, and the static shape of every segment between stages."""

import dataclasses

from himap_jax.scoring import Score


@dataclasses.dataclass(frozen=True)
class Stage:
  """One pruning stage.

  Attributes:
    layer: the stage acts before this layer (counted from 0), on the projections of the layer before it.
    keep: image tokens that remain.
    score: what the image tokens are ranked by.
  """

  layer: int
  keep: int
  score: Score


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
  """Stages in the order of their layers; no stages, no pruning."""

  stages: tuple[Stage, ...] = ()

  def segments(self, num_layers: int, num_image_tokens: int) -> tuple[Segment, ...]:
    """Cuts the decoder at the stages.

    Raises:
      ValueError: stages that the model cannot run: layers out of range or out of order, counts that do not shrink.
    """
    segments, first, count = [], 0, num_image_tokens
    for stage in self.stages:
      if not 1 <= stage.layer < num_layers:
        raise ValueError(
          f"cannot prune before layer {stage.layer}: the model has layers 0 to {num_layers - 1}, and a stage needs "
          "the attention of the layer before it"
        )
      if segments and stage.layer <= first:
        raise ValueError(f"pruning layers must ascend, but {stage.layer} follows {first}")
      if not 1 <= stage.keep <= count:
        raise ValueError(f"cannot keep {stage.keep} image tokens before layer {stage.layer}: there are {count}")
      segments.append(Segment(first, stage.layer, count, stage))
      first, count = stage.layer, stage.keep
    segments.append(Segment(first, num_layers, count, None))
    return tuple(segments)
