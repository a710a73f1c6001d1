"""Prefill with pruning between segments, and the KV cache of each segment.

Axes: B batch, S slots, A axes of positions (none for one), M image tokens, D model dim, V vocabulary.
"""

import functools
import types
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from himap_jax.errors import UserError
from himap_jax.inputs import (
  IMAGE,
  PADDING,
  UNUSED_ORDER,
  Calibration,
  Inputs,
  Layout,
  put_image_tokens,
  pytree,
  take_slots,
)
from himap_jax.model.cache import SegmentCache, padded
from himap_jax.model.decoder import Projections
from himap_jax.model.network import Embedded, Network
from himap_jax.pruning import scoring
from himap_jax.pruning.method import Selection, View, selection_of
from himap_jax.pruning.schedule import Schedule, Stage

NO_PARAMETERS: Mapping[str, Float[Array, ""]] = types.MappingProxyType({})


@pytree
class PrefillState:
  """The prompts after prefill.

  Attributes:
    logits: `[B, V]` float32, after each row's last token.
    caches: one per segment that has layers, also without image tokens.
    next_position: `[B]` rotary position of the first new token.
    next_order: `[B]` its order, see `Layout.order`.
    kept: for each stage `[B, M]` the indices of the kept image tokens, ascending; then −1 in a row that keeps fewer.
    ranks: for each stage `[B, M]` the places of those tokens in its ranking, 0 the best, and −1 for others in between;
      None if it does not rank. Empty unless `Schedule.tells_ranks`.
  """

  logits: Float[Array, "B V"]
  caches: tuple[SegmentCache, ...]
  next_position: Int[Array, "B"]
  next_order: Int[Array, "B"]
  kept: tuple[Int[Array, "B M"], ...]
  ranks: tuple[Int[Array, "B M"] | None, ...] = ()


class Sequence(NamedTuple):
  """Hidden states, rotary positions and layout of the prompts between two layers."""

  x: Float[Array, "B S D"]
  positions: Int[Array, "B S *A"]
  layout: Layout


class Context(NamedTuple):
  """Inputs of methods besides the sequence: random keys of the rows, prompts before pruning (or None), parameters."""

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
  """Runs prompts, embedded or not, through the model, pruning by the schedule; `keys` has one random key per row."""
  embedded = network.embed(prompts) if isinstance(prompts, Inputs) else prompts
  sequence, context = start(embedded), Context(keys, embedded, parameters)
  caches, kept, ranks, projections = [], [], [], []
  multiple = network.kernels.cache_multiple(network.config.text.head_dim)
  has_images = embedded.layout.num_image_tokens > 0
  frozen = frozenset(schedule.frozen_layers) if has_images else frozenset()
  for segment in schedule.segments(network.config.text.num_hidden_layers, embedded.layout.num_image_tokens):
    x, positions, layout = sequence
    with jax.named_scope(f"prefill_layers_{segment.first}_to_{segment.last}"):
      x, projections = network.language_model(
        x,
        positions,
        range(segment.first, segment.last),
        layout=layout,
        partial_layers=frozen,
        injections=embedded.injections,
      )
    sequence = sequence._replace(x=x)
    if projections:
      caches.append(padded(network.language_model.cache(projections, layout), multiple))
    if segment.stage is not None:
      rank = None
      if has_images:
        scored = network.language_model.scored(projections, layout)
        keep_positions = schedule.restore or schedule.keep_positions
        sequence, rank = prune(network, segment.stage, sequence, scored, context, keep_positions=keep_positions)
      if schedule.restore:
        own = calibration(layout, sequence.layout, embedded.layout, segment.stage.layer)
        sequence = sequence._replace(layout=sequence.layout.replace(calibration=own))
      kept.append(sequence.layout.original())
      ranks.append(rank)
  _, positions, layout = sequence
  last = layout.last_slot()[:, None]
  return PrefillState(
    logits=last_logits(network, sequence),
    caches=tuple(caches),
    next_position=positions.max(axis=tuple(range(1, positions.ndim))) + 1,
    next_order=take_slots(layout.order, last)[:, 0] + 1,
    kept=tuple(kept),
    ranks=tuple(ranks) if schedule.tells_ranks else (),
  )


def last_logits(network: Network, sequence: Sequence) -> Float[Array, "B V"]:
  """Logits after each row's last token."""
  return network.logits(take_slots(sequence.x, sequence.layout.last_slot()[:, None]))[:, 0]


def start(embedded: Embedded) -> Sequence:
  """The prompts before any layer."""
  return Sequence(embedded.x, embedded.positions, embedded.layout)


def prune(
  network: Network,
  stage: Stage,
  sequence: Sequence,
  projections: Projections | None,
  context: Context,
  *,
  keep_positions: bool = False,
) -> tuple[Sequence, Int[Array, "B M"] | None]:
  """Applies a stage to the sequence that enters its layer.

  `projections` are those of the previous layer in which image tokens are read; None at layer 0. With
  `keep_positions` positions and order keep their gaps at layer 0, too. The ranks are as in `PrefillState`.
  """
  with jax.named_scope(f"prune_before_layer_{stage.layer}"):
    with jax.named_scope("score"):
      selection = _select(stage, view(network, stage.layer, sequence, projections, context))
    with jax.named_scope("gather"):
      tower = None if context.embedded is None else context.embedded.tower
      pruned = apply(selection, sequence, None if tower is None else tower.is_newline)
      in_sequence = not network.config.text.cross_attention_layers
      # the decoder never sees the others: neither positions nor order have gaps
      if stage.layer == 0 and in_sequence and not keep_positions:
        slot, layout = jnp.arange(pruned.layout.num_slots, dtype=jnp.int32)[None], pruned.layout
        positions, order = (jnp.where(layout.kind == PADDING, unused, slot) for unused in (0, UNUSED_ORDER))
        if pruned.positions.ndim > 2:  # places in the picture, which stay
          positions = pruned.positions
        pruned = pruned._replace(positions=positions, layout=layout.replace(order=order))
  order, present = selection.order, selection.present
  return pruned, order if order is None or present is None else jnp.where(present, order, -1)


def calibration(before: Layout, after: Layout, whole: Layout, layer: int) -> Calibration:
  """The calibration of attention from `layer` on, given layouts before and after a stage, and before any pruning."""
  counts = (layout.num_present().astype(jnp.float32) for layout in (before, after))
  ratio = jnp.divide(*(jnp.maximum(count, 1) for count in counts))  # 1 in rows without image tokens
  is_image, has_lost = after.kind == IMAGE, after.num_present() < whole.num_present()
  return Calibration(jnp.where(is_image, jnp.log(ratio)[:, None], 0), is_image & has_lost[:, None], layer)


def _select(stage: Stage, view: View) -> Selection:
  """The stage's selection; in a ragged batch every row keeps the count of its own image tokens before pruning."""
  whole = view.layout if view.embedded_layout is None else view.embedded_layout
  if not whole.is_ragged:
    return stage.criterion.select(view, stage.keep)
  counts = jnp.array([stage.count(number) for number in range(whole.num_image_tokens + 1)], jnp.int32)
  num_kept = jnp.minimum(counts[whole.num_present()], view.layout.num_present())
  ranked = stage.criterion.rank(view, stage.keep)
  return selection_of(ranked, jnp.arange(stage.keep, dtype=jnp.int32)[None] < num_kept[:, None])


def view(network: Network, layer: int, sequence: Sequence, projections: Projections | None, context: Context) -> View:
  """A method's view before a layer; arguments as in `prune`. Its layout has the window of the previous layer."""
  embedded = context.embedded
  tower = None if embedded is None else embedded.tower
  text = network.config.text
  window = text.window(layer - 1)

  def next_layer(slots: Int[Array, "B R"]) -> tuple[Float[Array, "B R N H"], Float[Array, "B S K H"]]:
    if text.window(layer) != window:
      raise UserError(
        f"a method that reads the attention of the layer after it cannot prune before layer {layer}, where this "
        f"model's sliding window changes from {window} to {text.window(layer)}; prune before another layer"
      )
    own = network.language_model.project(sequence.x, sequence.positions, layer, slots)
    return own.query, own.key

  gain, kernel = None, network.kernels.received_attention(sequence.layout.num_slots)
  if sequence.layout.calibration is not None:
    gain, kernel = functools.partial(network.language_model.gain, sequence.positions, sequence.layout), None
  return View(
    layer=layer,
    x=sequence.x,
    layout=sequence.layout.replace(window=window),
    query=None if projections is None else projections.query,
    key=None if projections is None else projections.key,
    value=None if projections is None else projections.value,
    next_layer=next_layer,
    scale=text.head_dim**-0.5,
    embeddings=None if embedded is None else embedded.x,
    embedded_layout=None if embedded is None else embedded.layout,
    features=None if tower is None else tower.features,
    class_attention=None if tower is None else tower.class_attention,
    tower_keys=None if tower is None else tower.keys,
    project=network.multi_modal_projector,
    grid=None if tower is None else tower.grid,
    is_newline=None if tower is None else tower.is_newline,
    keys=context.keys,
    parameters=context.parameters,
    received=kernel or scoring.received_by_slots,
    gain=gain,
  )


def apply(selection: Selection, sequence: Sequence, is_newline: Bool[Array, "B N"] | None = None) -> Sequence:
  """Removes the image tokens that were not kept; the others keep their hidden states, positions and order.

  Of merged tokens all have new hidden states but newlines, which `is_newline` marks among those before any pruning.
  """
  source, layout = sequence.layout.keep(selection.kept, selection.present)
  x = take_slots(sequence.x, source)
  if selection.merged is not None:
    merged = selection.merged.astype(x.dtype)
    if is_newline is not None:
      own = take_slots(x, layout.image_slots())
      merged = jnp.where(take_slots(is_newline, layout.original())[:, :, None], own, merged)
    x = put_image_tokens(x, merged, layout)
  positions = take_slots(sequence.positions, source)
  is_padding = (layout.kind == PADDING).reshape(*layout.kind.shape, *[1] * (positions.ndim - 2))
  positions = jnp.where(is_padding, 0, positions)
  return Sequence(x, positions, layout)
