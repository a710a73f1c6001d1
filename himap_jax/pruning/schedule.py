"""Pruning schedules: the stages between layers, and the static shape of every segment between stages."""

import dataclasses
from collections.abc import Sequence

from himap_jax.errors import UserError
from himap_jax.pruning.method import Criterion


@dataclasses.dataclass(frozen=True)
class Stage:
  """One pruning stage.

  Attributes:
    layer: the stage is before it; counted from 0, 0 is before the decoder.
    keep: image tokens that it leaves: a count, or a share of those of the prompt before pruning.
    is_share: whether `keep` is a share; without it stages that keep 1 and 100% would be equal.
    share: the share that a count was made of, if it was: in a ragged batch every row has its own count.
  """

  layer: int
  keep: int | float
  criterion: Criterion
  share: float | None = None
  is_share: bool = dataclasses.field(init=False)

  def __post_init__(self) -> None:
    object.__setattr__(self, "is_share", isinstance(self.keep, float))

  def count(self, num_image_tokens: int) -> int:
    """Image tokens that it leaves of a prompt's: at least one of a share; a count may be above `num_image_tokens`."""
    share = self.keep if self.share is None else self.share
    return share if isinstance(share, int) else max(1, round(share * num_image_tokens))


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
    restore: whether attention to the image tokens that are left is calibrated (RESTORE, arXiv 2606.01711).
    keep_positions: whether tokens that are left before the decoder keep their positions, which RESTORE does anyway.
    tells_ranks: whether prefill also returns how the stages rank what they keep.
  """

  stages: tuple[Stage, ...] = ()
  frozen_layers: tuple[int, ...] = ()
  parameters: tuple[tuple[str, float], ...] = dataclasses.field(default=(), compare=False)
  restore: bool = False
  keep_positions: bool = False
  tells_ranks: bool = False

  @property
  def num_caches(self) -> int:
    """Number of segments that have layers."""
    return len(self.stages) + (not self.stages or self.stages[0].layer > 0)

  def at(self, num_layers: int, num_image_tokens: int) -> "Schedule":
    """The schedule of prompts with so many image tokens, with counts for shares.

    Raises:
      UserError: layers are out of range or out of order, or keep counts grow.
    """
    count = num_image_tokens
    for stage in self.stages:
      own = stage.count(num_image_tokens)
      if not 1 <= own <= count:
        raise UserError(f"cannot keep {own} image tokens before layer {stage.layer}: there are {count}")
      count = own
    return self.with_counts([s.stage.keep for s in self.segments(num_layers, num_image_tokens) if s.stage is not None])

  @property
  def is_ranking(self) -> bool:
    """Whether rows of a batch may have different numbers of image tokens; see `Criterion.rank`."""
    return all(stage.criterion.rank is not None for stage in self.stages)

  def with_counts(self, counts: Sequence[int]) -> "Schedule":
    """The same stages with other keep counts, such as those of one row if rows keep different counts."""
    stages = (dataclasses.replace(stage, keep=keep) for stage, keep in zip(self.stages, counts, strict=True))
    return dataclasses.replace(self, stages=tuple(stages))

  def segments(self, num_layers: int, num_image_tokens: int) -> tuple[Segment, ...]:
    """Splits the decoder at the stages, for prompts with so many image tokens before pruning.

    A stage before the decoder makes a first segment without layers. The stages of the segments have counts; a stage
    that keeps more than there are keeps all.

    Raises:
      UserError: layers are out of range or out of order.
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
      share = stage.keep if stage.is_share else None
      own = dataclasses.replace(stage, keep=min(count, stage.count(num_image_tokens)), share=share)
      segments.append(Segment(first, stage.layer, count, own))
      first, count = stage.layer, own.keep
    segments.append(Segment(first, num_layers, count, None))
    return tuple(segments)
