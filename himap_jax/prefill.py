"""Prefill with pruning between segments: select → gather, and the cache of what was kept.

Axes: B batch, S slots, M kept image tokens, D model dim, V vocabulary.
"""

import functools
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from himap_jax import cache
from himap_jax.decoder import Projections
from himap_jax.layout import Layout, put_image_tokens, take_slots
from himap_jax.llava import Inputs, Llava
from himap_jax.method import Selection, View
from himap_jax.schedule import Schedule, Segment, Stage
from himap_jax.vision import TowerOutput


@flax.struct.dataclass
class Prefill:
  """The result of a prefill.

  Attributes:
    logits: `[B, V]` float32, after each row's last token.
    caches: one cache a segment that has layers.
    next_position: `[B]` the rotary position of the first new token.
    kept: for each stage `[B, M]` the image tokens kept, as indices 0 … N − 1 into the picture's tokens, ascending.
  """

  logits: Float[Array, "B V"]
  caches: tuple[cache.SegmentCache, ...]
  next_position: Int[Array, "B"]
  kept: tuple[Int[Array, "B M"], ...]


class Sequence(NamedTuple):
  """What is left of the prompts between two layers.

  Attributes:
    x: `[B, S, D]` hidden states.
    positions: `[B, S]` rotary positions.
    layout: where the image tokens stand.
    original: `[B, M]` which of the picture's tokens they are, ascending.
  """

  x: Float[Array, "B S D"]
  positions: Int[Array, "B S"]
  layout: Layout
  original: Int[Array, "B M"]


Embedded = tuple[Float[Array, "B S D"], Layout, TowerOutput]


def prefill(model: Llava, params: Any, inputs: Inputs, keys: Key[Array, "B"], schedule: Schedule) -> Prefill:
  """Runs the prompts through the model, pruning as the schedule says.

  Args:
    model: the model.
    params: its parameters.
    inputs: the batch.
    keys: a random key a row, for methods that use chance.
    schedule: stages; static.
  """
  embedded = model.bind({"params": params}).embed(inputs)
  return prefill_embedded(model, params, embedded, keys, schedule)


def prefill_embedded(
  model: Llava,
  params: Any,
  embedded: Embedded,
  keys: Key[Array, "B"],
  schedule: Schedule,
) -> Prefill:
  """`prefill` of prompts that `Llava.embed` has embedded already."""
  bound = model.bind({"params": params})
  sequence = start(embedded)
  next_position = sequence.layout.length
  if schedule.stages and schedule.stages[0].layer == 0:  # the decoder never sees the other tokens: no gaps in positions
    next_position = next_position - (sequence.layout.num_image_tokens - schedule.stages[0].keep)
  segments = schedule.segments(model.config.text.num_hidden_layers, sequence.layout.num_image_tokens)
  sequence, caches, kept, _ = run_segments(
    bound, sequence, segments, embedded, keys, frozen_layers=schedule.frozen_layers
  )
  return Prefill(last_logits(bound, sequence), caches, next_position, kept)


def run_segments(
  bound: Llava,
  sequence: Sequence,
  segments: tuple[Segment, ...],
  embedded: Embedded | None,
  keys: Key[Array, "B"],
  *,
  frozen_layers: tuple[int, ...] = (),
) -> tuple[Sequence, tuple[cache.SegmentCache, ...], tuple[Int[Array, "B M"], ...], Projections | None]:
  """Runs segments of layers with the stages that follow them.

  Args:
    bound: the model with its parameters.
    sequence: what enters the first segment.
    segments: consecutive ones of a schedule.
    embedded: the prompts before any pruning; None where no stage reads them.
    keys: a random key a row, for methods that use chance.
    frozen_layers: layers that do not update image tokens.

  Returns:
    What is left of the prompts, a cache for each segment that has layers, the image tokens that each stage kept, and the last
    layer's projections.
  """
  caches, kept, projections = [], [], []
  for segment in segments:
    x, positions, layout, _ = sequence
    with jax.named_scope(f"prefill_layers_{segment.first}_to_{segment.last}"):
      x, projections = bound.language_model(
        x,
        positions,
        first=segment.first,
        last=segment.last,
        partial_layers=frozenset(frozen_layers),
        updated_slots=layout.text_slots(x.shape[1]) if frozen_layers else None,
      )
    sequence = sequence._replace(x=x)
    if projections:
      caches.append(
        cache.from_prefill(tuple(p.key for p in projections), tuple(p.value for p in projections), positions)
      )
    if segment.stage is not None:
      sequence = prune(bound, segment.stage, sequence, projections[-1] if projections else None, embedded, keys)
      kept.append(sequence.original)
      if segment.last == 0:
        sequence = sequence._replace(positions=_positions(sequence.layout, sequence.x.shape[1]))
  return sequence, tuple(caches), tuple(kept), projections[-1] if projections else None


def last_logits(bound: Llava, sequence: Sequence) -> Float[Array, "B V"]:
  """The logits after each row's last token."""
  return bound.logits(take_slots(sequence.x, (sequence.layout.length - 1)[:, None]))[:, 0]


def start(embedded: Embedded) -> Sequence:
  """The prompts before any layer."""
  x, layout, _ = embedded
  original = jnp.arange(layout.num_image_tokens, dtype=jnp.int32)[None]
  return Sequence(
    x, _positions(layout, x.shape[1]), layout, jnp.broadcast_to(original, (x.shape[0], layout.num_image_tokens))
  )


def prune(
  bound: Llava,
  stage: Stage,
  sequence: Sequence,
  projections: Projections | None,
  embedded: Embedded | None,
  keys: Key[Array, "B"],
) -> Sequence:
  """What a stage leaves of the prompts.

  Args:
    bound: the model with its parameters.
    stage: the stage.
    sequence: what enters the stage's layer.
    projections: of the layer before; None before the decoder.
    embedded: the prompts before any pruning; None where the stage does not read them.
    keys: a random key a row.
  """
  x, positions, layout, original = sequence
  with jax.named_scope(f"prune_before_layer_{stage.layer}"):
    with jax.named_scope("score"):
      seen = view(bound, stage.layer, sequence, projections, embedded, keys)
      selection = stage.criterion.select(seen, stage.keep)
    with jax.named_scope("gather"):
      x, positions, layout = apply(selection, x, positions, layout)
    return Sequence(x, positions, layout, jnp.take_along_axis(original, selection.kept, axis=1))


def view(
  bound: Llava,
  layer: int,
  sequence: Sequence,
  projections: Projections | None,
  embedded: Embedded | None,
  keys: Key[Array, "B"],
) -> View:
  """What a method sees before a layer; the arguments are those of `prune`."""
  embeddings, embedded_layout, tower = embedded or (None, None, None)
  return View(
    layer=layer,
    x=sequence.x,
    layout=sequence.layout,
    original=sequence.original,
    projections=projections,
    next_projections=functools.partial(bound.language_model.project, sequence.x, sequence.positions, layer),
    embeddings=embeddings,
    embedded_layout=embedded_layout,
    tower=tower,
    project=bound.multi_modal_projector,
    keys=keys,
  )


def _positions(layout: Layout, num_slots: int) -> Int[Array, "B S"]:
  """Every slot's own number, and that of unused slots in padding."""
  slot = jnp.arange(num_slots, dtype=jnp.int32)[None]
  return jnp.where(slot < layout.length[:, None], slot, cache.UNUSED_POSITION)


def apply(
  selection: Selection, x: Float[Array, "B S D"], positions: Int[Array, "B S"], layout: Layout
) -> tuple[Float[Array, "B R D"], Int[Array, "B R"], Layout]:
  """Removes the image tokens that were not kept from hidden states and positions; the rest keep theirs."""
  source, layout = layout.keep(selection.kept, x.shape[1])
  x = jnp.take_along_axis(x, source[:, :, None], axis=1)
  if selection.merged is not None:
    x = put_image_tokens(x, layout.image_start, selection.merged.astype(x.dtype))
  return x, jnp.take_along_axis(positions, source, axis=1), layout
