"""Ways to run the same HiMAP prefill: how the shapes come about, and what is one program.

Axes: B batch, S slots, R remaining slots, D model dim, V vocabulary.

Every variant gives the logits of the library's prefill and computes keys and values of all layers; `dynamic` chooses other keep
counts.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree

from experiments.compile_study.recorder import Recorder
from himap_jax import prefill as library
from himap_jax import rope
from himap_jax.cache import UNUSED_POSITION
from himap_jax.decoder import DecoderLayer, Projections
from himap_jax.layout import take_slots
from himap_jax.llava import Inputs, Llava
from himap_jax.method import Criterion, Selection, View, top
from himap_jax.methods.himap import image_attention, instruction_attention
from himap_jax.prefill import Embedded, Sequence
from himap_jax.schedule import Schedule, Segment, Stage

SCORES = (instruction_attention, image_attention)
COVERED = 0.8  # of the scores' sum, by the tokens that `dynamic` keeps
GRANULE = 72  # image tokens that its counts are multiples of, of 576

# `(params, inputs)` to logits `[B, V]`.
Run = Callable[[PyTree, Inputs], Float[Array, "B V"]]


@dataclasses.dataclass(frozen=True)
class Variant:
  """A way to run a prefill.

  Attributes:
    build: makes it: compiled by a recorder, for a model and HiMAP's schedule.
    shows: what is different about it.
    is_bucketed: whether its prompts are padded to a bucket, and not to the longest of their batch.
    can_be_abstract: whether its shapes are known without numbers.
  """

  build: Callable[[Recorder, Llava, Schedule], Run]
  shows: str
  is_bucketed: bool = True
  can_be_abstract: bool = True


def gather(recorder: Recorder, model: Llava, schedule: Schedule) -> Run:
  """The library's own."""

  def run(params: PyTree, inputs: Inputs) -> Any:
    result = library.prefill(model, params, inputs, _keys(inputs), schedule)
    return result.logits, result.caches

  program = recorder.jit(run)
  return lambda params, inputs: program(params, inputs)[0]


def selecting(choose: Callable[[Array, int], Array]) -> Callable[[Recorder, Llava, Schedule], Run]:
  """The library's own with another operation for the highest scores."""

  def build(recorder: Recorder, model: Llava, schedule: Schedule) -> Run:
    def stage(own: Stage, score: Callable[[View], Array]) -> Stage:
      def select(view: View, keep: int) -> Selection:
        return Selection(jnp.sort(choose(score(view), keep), axis=1))

      return dataclasses.replace(own, criterion=Criterion(select, own.criterion.cost))

    return gather(recorder, model, Schedule(tuple(map(stage, schedule.stages, SCORES))))

  return build


def one_hot(recorder: Recorder, model: Llava, schedule: Schedule) -> Run:
  """Hidden states are multiplied with a matrix of zeros and ones instead of being gathered."""

  def run(params: PyTree, inputs: Inputs) -> Any:
    bound, embedded = _start(model, params, inputs)
    sequence, keys_values = library.start(embedded), []
    for segment in _segments(model, schedule, sequence):
      sequence, projections = _run_layers(bound, segment, sequence)
      keys_values += [(p.key, p.value) for p in projections]
      if segment.stage is not None:
        pruned = library.prune(bound, segment.stage, sequence, projections[-1], embedded, _keys(inputs))
        matrix = _same_position(pruned.positions, sequence.positions).astype(sequence.x.dtype)
        x = jnp.einsum("BRS,BSD->BRD", matrix, sequence.x, preferred_element_type=jnp.float32)
        sequence = pruned._replace(x=x.astype(sequence.x.dtype))
    return library.last_logits(bound, sequence), keys_values

  program = recorder.jit(run)
  return lambda params, inputs: program(params, inputs)[0]


def mask(recorder: Recorder, model: Llava, schedule: Schedule) -> Run:
  """Every token goes through every layer; those that were not kept are hidden from attention."""

  def run(params: PyTree, inputs: Inputs) -> Any:
    bound, embedded = _start(model, params, inputs)
    whole = library.start(embedded)
    kept, keys_values, visible = whole, [], None
    for segment in _segments(model, schedule, whole):
      whole, projections = _run_layers(bound, segment, whole, visible)
      keys_values += [(p.key, p.value) for p in projections]
      if segment.stage is not None:
        slots = _same_position(kept.positions, whole.positions).argmax(axis=2).astype(jnp.int32)
        kept = kept._replace(x=take_slots(whole.x, slots))
        scored = jax.tree.map(lambda x, slots=slots: take_slots(x, slots), projections[-1])
        kept = library.prune(bound, segment.stage, kept, scored, embedded, _keys(inputs))
        visible = _same_position(kept.positions, whole.positions).any(axis=1)
    return library.last_logits(bound, whole), keys_values

  program = recorder.jit(run)
  return lambda params, inputs: program(params, inputs)[0]


def scan(recorder: Recorder, model: Llava, schedule: Schedule) -> Run:
  """The layers of a segment are one loop over stacked weights; the last, which is scored, stands alone."""
  layer = DecoderLayer(model.config.text, model.attend)
  stacked: list[PyTree] = []

  def run(params: PyTree, stacked: list[PyTree], inputs: Inputs) -> Any:
    bound, embedded = _start(model, params, inputs)
    sequence, keys_values = library.start(embedded), []
    text = model.config.text
    for segment, weights in zip(_segments(model, schedule, sequence), stacked, strict=True):
      rotation = rope.rotation(text.rope, text.head_dim, sequence.positions)

      def step(x: Array, weights: PyTree, rotation: Any = rotation) -> Any:
        x, projections = layer.apply({"params": weights}, x, rotation, None)
        return x, (projections.key, projections.value)

      x, some = jax.lax.scan(step, sequence.x, weights)
      keys_values.append(some)
      last = dataclasses.replace(segment, first=segment.last - 1)
      sequence, projections = _run_layers(bound, last, sequence._replace(x=x))
      keys_values += [(p.key, p.value) for p in projections]
      if segment.stage is not None:
        sequence = library.prune(bound, segment.stage, sequence, projections[-1], embedded, _keys(inputs))
    return library.last_logits(bound, sequence), keys_values

  program = recorder.jit(run)

  def call(params: PyTree, inputs: Inputs) -> Array:
    num_image_tokens = model.config.num_image_tokens(*inputs.pixel_values.shape[2:])
    for segment in schedule.segments(model.config.text.num_hidden_layers, num_image_tokens)[len(stacked) :]:
      layers = [params["language_model"][f"layers_{index}"] for index in range(segment.first, segment.last - 1)]
      stacked.append(jax.tree.map(_stack, *layers))
    return program(params, stacked, inputs)[0]

  return call


def by_segment(recorder: Recorder, model: Llava, schedule: Schedule) -> Run:
  """A program for every segment, and one for each stage."""
  steps = _Steps(recorder, model)

  def run(params: PyTree, inputs: Inputs) -> Array:
    embedded, sequence = steps.embed(params, inputs)
    for segment in _segments(model, schedule, sequence):
      sequence, scored = steps.layers(params, sequence, segment=segment)
      if segment.stage is not None:
        sequence = steps.prune(params, sequence, scored, embedded, stage=segment.stage)
    return steps.logits(params, sequence)

  return run


def dynamic(recorder: Recorder, model: Llava, schedule: Schedule) -> Run:
  """By segment; each stage keeps as few tokens as cover `COVERED` of the scores in every row, rounded up to `GRANULE`s."""
  steps = _Steps(recorder, model)

  def run(params: PyTree, inputs: Inputs) -> Array:
    embedded, sequence = steps.embed(params, inputs)
    first = 0
    for number, stage in enumerate((*schedule.stages, None)):
      last = model.config.text.num_hidden_layers if stage is None else stage.layer
      count = sequence.layout.num_image_tokens
      sequence, scored = steps.layers(params, sequence, segment=Segment(first, last, count, stage))
      if stage is not None:
        wanted = int(steps.wanted(params, sequence, scored, embedded, number=number, layer=stage.layer))
        keep = min(count, -(-wanted // GRANULE) * GRANULE)
        stage = dataclasses.replace(stage, keep=keep)
        sequence = steps.prune(params, sequence, scored, embedded, stage=stage)
      first = last
    return steps.logits(params, sequence)

  return run


class _Steps:
  """A prefill in programs of its own."""

  def __init__(self, recorder: Recorder, model: Llava):
    def embed(params: PyTree, inputs: Inputs) -> tuple[Embedded, Sequence]:
      _, embedded = _start(model, params, inputs)
      return embedded, library.start(embedded)

    def layers(params: PyTree, sequence: Sequence, *, segment: Segment) -> tuple[Sequence, Projections]:
      sequence, projections = _run_layers(model.bind({"params": params}), segment, sequence)
      return sequence, projections[-1]

    def prune(params: PyTree, sequence: Sequence, scored: Projections, embedded: Embedded, *, stage: Stage) -> Sequence:
      keys = jax.random.split(jax.random.key(0), sequence.x.shape[0])
      return library.prune(model.bind({"params": params}), stage, sequence, scored, embedded, keys)

    def wanted(
      params: PyTree, sequence: Sequence, scored: Projections, embedded: Embedded, *, number: int, layer: int
    ) -> Int[Array, ""]:
      counts = []

      def select(view: View, keep: int) -> Selection:
        score = SCORES[number](view)
        covered = jnp.cumsum(-jnp.sort(-score, axis=1), axis=1)
        counts.append((covered < COVERED * covered[:, -1:]).sum(axis=1).max() + 1)
        return Selection(top(score, keep))

      stage = Stage(layer, sequence.layout.num_image_tokens, Criterion(select, lambda sizes: 0))
      prune(params, sequence, scored, embedded, stage=stage)
      return counts[0]

    def logits(params: PyTree, sequence: Sequence) -> Float[Array, "B V"]:
      return library.last_logits(model.bind({"params": params}), sequence)

    self.embed, self.layers, self.prune, self.wanted, self.logits = map(
      recorder.jit, (embed, layers, prune, wanted, logits)
    )


def _keys(inputs: Inputs) -> Array:
  return jax.random.split(jax.random.key(0), inputs.tokens.shape[0])


def _start(model: Llava, params: PyTree, inputs: Inputs) -> tuple[Llava, Embedded]:
  bound = model.bind({"params": params})
  return bound, bound.embed(inputs)


def _segments(model: Llava, schedule: Schedule, sequence: Sequence) -> tuple[Segment, ...]:
  return schedule.segments(model.config.text.num_hidden_layers, sequence.layout.num_image_tokens)


def _run_layers(
  bound: Llava, segment: Segment, sequence: Sequence, visible: Bool[Array, "B S"] | None = None
) -> tuple[Sequence, list[Projections]]:
  hidden = (
    None
    if visible is None
    else jnp.broadcast_to(visible[:, None, None], (*visible.shape[:1], 1, *[visible.shape[1]] * 2))
  )
  x, projections = bound.language_model(
    sequence.x, sequence.positions, first=segment.first, last=segment.last, mask=hidden
  )
  return sequence._replace(x=x), projections


def _stack(*layers: Any) -> Any:
  if isinstance(layers[0], jax.ShapeDtypeStruct):
    own = layers[0].sharding
    spread = NamedSharding(own.mesh, PartitionSpec(None, *own.spec))
    return jax.ShapeDtypeStruct((len(layers), *layers[0].shape), layers[0].dtype, sharding=spread)
  return jnp.stack(layers)


def _same_position(positions: Int[Array, "B R"], others: Int[Array, "B S"]) -> Bool[Array, "B R S"]:
  """Where two sequences hold the same token; padding is nowhere."""
  return (positions[:, :, None] == others[:, None]) & (others != UNUSED_POSITION)[:, None]


VARIANTS = {
  "gather": Variant(gather, "static counts, a gather, unrolled layers, one program: the library's own"),
  "mask": Variant(mask, "no token is removed; attention does not see what was not kept"),
  "one_hot": Variant(one_hot, "a product with zeros and ones in place of the gather"),
  "top_k": Variant(selecting(lambda scores, k: jax.lax.top_k(scores, k)[1]), "jax.lax.top_k in place of a stable sort"),
  "approx_max_k": Variant(
    selecting(lambda scores, k: jax.lax.approx_max_k(scores, k)[1]), "jax.lax.approx_max_k in place of a stable sort"
  ),
  "scan": Variant(scan, "a loop over the stacked layers of a segment"),
  "by_segment": Variant(by_segment, "a program for every segment and stage"),
  "dynamic": Variant(dynamic, "keep counts follow the scores, in steps; by segment", can_be_abstract=False),
  "exact_length": Variant(gather, "no buckets: compiled for every length", is_bucketed=False),
}
