"""Ways to run the same HiMAP prefill: how the shapes come about, and what is one program.

Axes: B batch, S slots, R remaining slots, D model dim, M image tokens, V vocabulary.

Every variant gives the logits of the library's prefill and computes keys and values of all layers; `dynamic` chooses other keep
counts.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree

from experiments.compile_study.recorder import Recorder
from himap_jax.engine import prefill as library
from himap_jax.engine.prefill import Context, Sequence
from himap_jax.inputs import UNUSED_ORDER, Inputs, Layout, take_slots
from himap_jax.model import rope
from himap_jax.model.decoder import DecoderLayer, Projections
from himap_jax.model.network import Embedded, Model, Network
from himap_jax.pruning.method import Criterion, Selection, View
from himap_jax.pruning.methods.himap import image_attention, instruction_attention
from himap_jax.pruning.schedule import Schedule, Segment, Stage

SCORES = (instruction_attention, image_attention)
COVERED = 0.8  # of the scores' sum, by the tokens that `dynamic` keeps
GRANULE = 72  # image tokens that its counts are multiples of, of 576

# `(model, inputs)` to logits `[B, V]`.
Run = Callable[[Model, Inputs], Float[Array, "B V"]]
Build = Callable[[Recorder, Schedule], Run]


@dataclasses.dataclass(frozen=True)
class Variant:
  """A way to run a prefill.

  Attributes:
    build: makes it: compiled by a recorder, for HiMAP's schedule.
    shows: what is different about it.
    is_bucketed: whether its prompts are padded to a bucket, and not to the longest of their batch.
    can_be_abstract: whether its shapes are known without numbers.
  """

  build: Build
  shows: str
  is_bucketed: bool = True
  can_be_abstract: bool = True


def one_program(run: Callable[[Network, Inputs, Schedule], Any]) -> Build:
  """A variant that is one program, of logits and of keys and values, which are results so that none is left out."""

  def build(recorder: Recorder, schedule: Schedule) -> Run:
    program = recorder.jit(lambda model, inputs: run(model.bind(), inputs, schedule))
    return lambda model, inputs: program(model, inputs)[0]

  return build


def gather(network: Network, inputs: Inputs, schedule: Schedule) -> Any:
  """The library's own."""
  result = library.prefill(network, inputs, _keys(inputs.tokens), schedule)
  return result.logits, result.caches


def selecting(choose: Callable[[Array, int], Array]) -> Build:
  """The library's own with another operation for the highest scores."""

  def run(network: Network, inputs: Inputs, schedule: Schedule) -> Any:
    def stage(own: Stage, score: Callable[[View], Array]) -> Stage:
      def select(view: View, keep: int) -> Selection:
        return Selection(jnp.sort(choose(score(view), keep), axis=1))

      return dataclasses.replace(own, criterion=Criterion(select, own.criterion.cost))

    return gather(network, inputs, Schedule(tuple(map(stage, schedule.stages, SCORES))))

  return one_program(run)


def one_hot(network: Network, inputs: Inputs, schedule: Schedule) -> Any:
  """Hidden states are multiplied with a matrix of zeros and ones instead of being gathered."""

  def prune(network: Network, stage: Stage, sequence: Sequence, *others: Any) -> Sequence:
    pruned = _prune(network, stage, sequence, *others)
    matrix = _same_token(pruned.layout, sequence.layout).astype(sequence.x.dtype)
    x = jnp.einsum("BRS,BSD->BRD", matrix, sequence.x, preferred_element_type=jnp.float32)
    return pruned._replace(x=x.astype(sequence.x.dtype))

  return _in_segments(network, inputs, schedule, prune=prune)


def mask(network: Network, inputs: Inputs, schedule: Schedule) -> Any:
  """Every token goes through every layer; those that were not kept are hidden from attention."""
  kept, visible = None, None

  def layers(network: Network, segment: Segment, whole: Sequence) -> tuple[Sequence, list[Projections]]:
    return _run_layers(network, segment, whole, visible)

  def prune(network: Network, stage: Stage, whole: Sequence, scored: Projections, embedded: Embedded) -> Sequence:
    nonlocal kept, visible
    slots = _same_token((kept or whole).layout, whole.layout).argmax(axis=2).astype(jnp.int32)
    scored = jax.tree.map(lambda x: take_slots(x, slots), scored)
    kept = _prune(network, stage, (kept or whole)._replace(x=take_slots(whole.x, slots)), scored, embedded)
    visible = _same_token(kept.layout, whole.layout).any(axis=1)
    return whole

  return _in_segments(network, inputs, schedule, layers, prune)


def scan(recorder: Recorder, schedule: Schedule) -> Run:
  """The layers of a segment are one loop over stacked weights; the last, which is scored, stands alone."""
  stacked: dict[int, PyTree] = {}

  def run(model: Model, stacked: dict[int, PyTree], inputs: Inputs) -> Any:
    text = model.config.text
    layer = DecoderLayer(text, model.network.kernels)

    def layers(network: Network, segment: Segment, sequence: Sequence) -> tuple[Sequence, list[Projections]]:
      rotation = rope.rotation(text.rope, text.head_dim, sequence.positions)

      def step(x: Array, weights: PyTree) -> tuple[Array, Projections]:
        x, projections = layer.apply({"params": weights}, x, rotation, None)
        return x, projections.replace(query=None)

      x, looped = jax.lax.scan(step, sequence.x, stacked[segment.first])
      last = dataclasses.replace(segment, first=segment.last - 1)
      sequence, projections = _run_layers(network, last, sequence._replace(x=x))
      return sequence, [looped, *projections]

    return _in_segments(model.bind(), inputs, schedule, layers)

  program = recorder.jit(run)

  def call(model: Model, inputs: Inputs) -> Array:
    for segment in schedule.segments(model.config.text.num_hidden_layers, inputs.layout.num_image_tokens):
      if segment.first not in stacked:
        names = [f"layers_{index}" for index in range(segment.first, segment.last - 1)]
        stacked[segment.first] = jax.tree.map(_stack, *(model.params["language_model"][name] for name in names))
    return program(model, stacked, inputs)[0]

  return call


def by_segment(recorder: Recorder, schedule: Schedule, *, is_dynamic: bool = False) -> Run:
  """A program for every segment, and one for each stage.

  Where it is dynamic, each stage keeps as few tokens as cover `COVERED` of the scores in every row, rounded up to `GRANULE`s.
  """

  @recorder.jit
  def embed(model: Model, inputs: Inputs) -> tuple[Embedded, Sequence]:
    embedded = model.bind().embed(inputs)
    return embedded, library.start(embedded)

  @recorder.jit
  def layers(model: Model, sequence: Sequence, *, segment: Segment) -> tuple[Sequence, Projections]:
    sequence, projections = _run_layers(model.bind(), segment, sequence)
    return sequence, projections[-1]

  @recorder.jit
  def wanted(
    model: Model, sequence: Sequence, scored: Projections, embedded: Embedded, *, number: int
  ) -> Int[Array, ""]:
    context = Context(_keys(sequence.x), embedded)
    score = SCORES[number](library.view(model.bind(), schedule.stages[number].layer, sequence, scored, context))
    covered = jnp.cumsum(-jnp.sort(-score, axis=1), axis=1)
    return (covered < COVERED * covered[:, -1:]).sum(axis=1).max() + 1

  @recorder.jit
  def prune(model: Model, sequence: Sequence, scored: Projections, embedded: Embedded, *, stage: Stage) -> Sequence:
    return _prune(model.bind(), stage, sequence, scored, embedded)

  @recorder.jit
  def logits(model: Model, sequence: Sequence) -> Float[Array, "B V"]:
    return library.last_logits(model.bind(), sequence)

  def run(model: Model, inputs: Inputs) -> Array:
    embedded, sequence = embed(model, inputs)
    segments = schedule.segments(model.config.text.num_hidden_layers, inputs.layout.num_image_tokens)
    for number, segment in enumerate(segments):
      sequence, scored = layers(model, sequence, segment=segment)
      stage = segment.stage
      if stage is not None and is_dynamic:
        keep = -(-int(wanted(model, sequence, scored, embedded, number=number)) // GRANULE) * GRANULE
        stage = dataclasses.replace(stage, keep=min(sequence.layout.num_image_tokens, keep))
      if stage is not None:
        sequence = prune(model, sequence, scored, embedded, stage=stage)
    return logits(model, sequence)

  return run


def _keys(rows: Array) -> Array:
  return jax.random.split(jax.random.key(0), rows.shape[0])


def _prune(network: Network, stage: Stage, sequence: Sequence, scored: Projections, embedded: Embedded) -> Sequence:
  return library.prune(network, stage, sequence, scored, Context(_keys(sequence.x), embedded))


def _run_layers(
  network: Network, segment: Segment, sequence: Sequence, visible: Bool[Array, "B S"] | None = None
) -> tuple[Sequence, list[Projections]]:
  hidden = None
  if visible is not None:
    batch, slots = visible.shape
    hidden = jnp.broadcast_to(visible[:, None, None], (batch, 1, slots, slots))
  layers = range(segment.first, segment.last)
  x, projections = network.language_model(sequence.x, sequence.positions, layers, mask=hidden)
  return sequence._replace(x=x), projections


def _in_segments(
  network: Network, inputs: Inputs, schedule: Schedule, layers: Any = _run_layers, prune: Any = _prune
) -> tuple[Float[Array, "B V"], list[tuple[Array, Array]]]:
  """The logits, and the keys and values of all layers, of a prefill in which segments or stages are run in another way."""
  embedded = network.embed(inputs)
  sequence, keys_values = library.start(embedded), []
  for segment in schedule.segments(network.config.text.num_hidden_layers, inputs.layout.num_image_tokens):
    sequence, projections = layers(network, segment, sequence)
    keys_values += [(p.key, p.value) for p in projections]
    if segment.stage is not None:
      sequence = prune(network, segment.stage, sequence, projections[-1], embedded)
  return library.last_logits(network, sequence), keys_values


def _stack(*layers: Any) -> Any:
  if isinstance(layers[0], jax.ShapeDtypeStruct):
    own = layers[0].sharding
    spread = NamedSharding(own.mesh, PartitionSpec(None, *own.spec))
    return jax.ShapeDtypeStruct((len(layers), *layers[0].shape), layers[0].dtype, sharding=spread)
  return jnp.stack(layers)


def _same_token(layout: Layout, other: Layout) -> Bool[Array, "B R S"]:
  """Where two sequences hold the same token; padding is nowhere."""
  return (layout.order[:, :, None] == other.order[:, None]) & (other.order != UNUSED_ORDER)[:, None]


VARIANTS = {
  "gather": Variant(one_program(gather), "static counts, a gather, unrolled layers, one program: the library's own"),
  "mask": Variant(one_program(mask), "no token is removed; attention does not see what was not kept"),
  "one_hot": Variant(one_program(one_hot), "a product with zeros and ones in place of the gather"),
  "top_k": Variant(selecting(lambda scores, k: jax.lax.top_k(scores, k)[1]), "jax.lax.top_k in place of a stable sort"),
  "approx_max_k": Variant(
    selecting(lambda scores, k: jax.lax.approx_max_k(scores, k)[1]), "jax.lax.approx_max_k in place of a stable sort"
  ),
  "scan": Variant(scan, "a loop over the stacked layers of a segment"),
  "by_segment": Variant(by_segment, "a program for every segment and stage"),
  "dynamic": Variant(
    functools.partial(by_segment, is_dynamic=True),
    "keep counts follow the scores, in steps; by segment",
    can_be_abstract=False,
  ),
  "exact_length": Variant(one_program(gather), "no buckets: compiled for every length", is_bucketed=False),
}
