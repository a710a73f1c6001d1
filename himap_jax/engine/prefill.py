"""Prefill with pruning between segments: select → gather, and the cache of what was kept.

Axes: B batch, S slots, M image tokens, D model dim, V vocabulary.
"""

import types
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from himap_jax.inputs import PADDING, Inputs, Layout, put_image_tokens, pytree, take_slots
from himap_jax.model import cache
from himap_jax.model.decoder import Projections
from himap_jax.model.network import Embedded, Network
from himap_jax.pruning.method import Selection, View
from himap_jax.pruning.schedule import Schedule, Stage

NO_PARAMETERS: Mapping[str, Float[Array, ""]] = types.MappingProxyType({})


@pytree
class PrefillState:
  """The prompts after their prefill.

  Attributes:
    logits: `[B, V]` float32, after each row's last token.
    caches: one cache a segment that has layers.
    next_position: `[B]` the rotary position of the first new token.
    next_order: `[B]` its order, see `Layout.order`.
    kept: for each stage `[B, M]` the numbers of the image tokens kept, ascending; −1 where a row keeps fewer.
  """

  logits: Float[Array, "B V"]
  caches: tuple[cache.SegmentCache, ...]
  next_position: Int[Array, "B"]
  next_order: Int[Array, "B"]
  kept: tuple[Int[Array, "B M"], ...]


class Sequence(NamedTuple):
  """What is left of the prompts between two layers.

  Attributes:
    x: `[B, S, D]` hidden states.
    positions: `[B, S]` rotary positions.
    layout: what each slot holds.
  """

  x: Float[Array, "B S D"]
  positions: Int[Array, "B S"]
  layout: Layout


class Context(NamedTuple):
  """What methods may read beside the sequence.

  Attributes:
    keys: `[B]` a random key a row.
    embedded: the prompts before any pruning; None where no stage reads them.
    parameters: of the methods, by name.
  """

  keys: Key[Array, "B"]
  embedded: Embedded | None = None
  parameters: Mapping[str, Float[Array, ""]] = NO_PARAMETERS


def prefill(
  network: Network,
  prompts: Inputs | Embedded,
  keys: Key[Array, "B"],
  schedule: Schedule,
  parameters: Mapping[str, Float[Array, ""]] = NO_PARAMETERS,
) -> PrefillState:
  """Runs the prompts through the model, pruning as the schedule says.

  Args:
    network: the model, bound.
    prompts: the batch; embedded by `Network.embed` or not.
    keys: a random key a row, for methods that use chance.
    schedule: stages; static.
    parameters: of the schedule's methods, by name.
  """
  embedded = network.embed(prompts) if isinstance(prompts, Inputs) else prompts
  sequence, context = start(embedded), Context(keys, embedded, parameters)
  caches, kept, projections = [], [], []
  for segment in schedule.segments(network.config.text.num_hidden_layers, embedded.layout.num_image_tokens):
    x, positions, layout = sequence
    with jax.named_scope(f"prefill_layers_{segment.first}_to_{segment.last}"):
      x, projections = network.language_model(
        x,
        positions,
        range(segment.first, segment.last),
        partial_layers=frozenset(schedule.frozen_layers),
        updated_slots=layout.text_slots() if schedule.frozen_layers else None,
      )
    sequence = sequence._replace(x=x)
    if projections:
      own = (tuple(getattr(p, name) for p in projections) for name in ("key", "value"))
      caches.append(cache.from_prefill(*own, layout.order))
    if segment.stage is not None:
      sequence = prune(network, segment.stage, sequence, projections[-1] if projections else None, context)
      kept.append(sequence.layout.original())
  _, positions, layout = sequence
  last = layout.last_slot()[:, None]
  return PrefillState(
    logits=last_logits(network, sequence),
    caches=tuple(caches),
    next_position=positions.max(axis=1) + 1,
    next_order=take_slots(layout.order, last)[:, 0] + 1,
    kept=tuple(kept),
  )


def last_logits(network: Network, sequence: Sequence) -> Float[Array, "B V"]:
  """The logits after each row's last token."""
  return network.logits(take_slots(sequence.x, sequence.layout.last_slot()[:, None]))[:, 0]


def start(embedded: Embedded) -> Sequence:
  """The prompts before any layer."""
  return Sequence(embedded.x, embedded.positions, embedded.layout)


def prune(
  network: Network, stage: Stage, sequence: Sequence, projections: Projections | None, context: Context
) -> Sequence:
  """What a stage leaves of the prompts.

  Args:
    network: the model, bound.
    stage: the stage.
    sequence: what enters the stage's layer.
    projections: of the layer before; None before the decoder.
    context: what methods may read.
  """
  with jax.named_scope(f"prune_before_layer_{stage.layer}"):
    with jax.named_scope("score"):
      selection = stage.criterion.select(view(network, stage.layer, sequence, projections, context), stage.keep)
    with jax.named_scope("gather"):
      pruned = apply(selection, sequence)
      if stage.layer == 0:  # the decoder never sees the other tokens: no gaps in positions
        slot = jnp.arange(pruned.layout.num_slots, dtype=jnp.int32)[None]
        pruned = pruned._replace(positions=jnp.where(pruned.layout.kind == PADDING, 0, slot))
  return pruned


def view(network: Network, layer: int, sequence: Sequence, projections: Projections | None, context: Context) -> View:
  """What a method sees before a layer; the arguments are those of `prune`."""
  embedded = context.embedded
  tower = None if embedded is None else embedded.tower

  def next_layer(slots: Int[Array, "B R"]) -> tuple[Float[Array, "B R N H"], Float[Array, "B S K H"]]:
    own = network.language_model.project(sequence.x, sequence.positions, layer, slots)
    return own.query, own.key

  return View(
    layer=layer,
    x=sequence.x,
    layout=sequence.layout,
    query=None if projections is None else projections.query,
    key=None if projections is None else projections.key,
    next_layer=next_layer,
    scale=network.config.text.head_dim**-0.5,
    embeddings=None if embedded is None else embedded.x,
    embedded_layout=None if embedded is None else embedded.layout,
    features=None if tower is None else tower.features,
    class_attention=None if tower is None else tower.class_attention,
    tower_keys=None if tower is None else tower.keys,
    project=network.multi_modal_projector,
    keys=context.keys,
    parameters=context.parameters,
  )


def apply(selection: Selection, sequence: Sequence) -> Sequence:
  """Removes the image tokens that were not kept; the rest keep their hidden states, positions and order."""
  source, layout = sequence.layout.keep(selection.kept, selection.present)
  x = take_slots(sequence.x, source)
  if selection.merged is not None:
    x = put_image_tokens(x, selection.merged.astype(x.dtype), layout)
  positions = jnp.where(layout.kind == PADDING, 0, take_slots(sequence.positions, source))
  return Sequence(x, positions, layout)
