"""Ways to run the same HiMAP prefill, which differ in shapes or in the division into programs.

Every variant gives the logits of the library's prefill and computes keys and values of all layers; `dynamic` chooses
other keep counts.

Axes: B batch, S slots, R remaining slots, D model dim, M image tokens, V vocabulary.
"""

import dataclasses
import functools
import types
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
from himap_jax.model.network import Embedded, Model
from himap_jax.pruning.method import Criterion, Selection, View
from himap_jax.pruning.methods.himap import image_attention, instruction_attention
from himap_jax.pruning.schedule import Schedule, Segment, Stage

SCORES = (instruction_attention, image_attention)
COVERED = 0.8  # share of the scores' sum covered by the tokens that `dynamic` keeps
GRANULE = 72  # its keep counts are multiples of this, out of 576

# (model, inputs) → logits.
Run = Callable[[Model, Inputs], Float[Array, "B V"]]
Build = Callable[[Recorder, Schedule], Run]


@dataclasses.dataclass(frozen=True)
class Variant:
  """A way to run a prefill."""

  build: Build  # makes it from a recorder and HiMAP's schedule
  shows: str  # its difference to the others
  is_bucketed: bool = True  # whether prompts are padded to a bucket, not to the longest of their batch
  can_be_abstract: bool = True  # whether its shapes are known without values


def one_program(run: Callable[[Model, Inputs, Schedule], Any]) -> Build:
  """A variant in one program, which also returns keys and values so that none is optimised away."""

  def build(recorder: Recorder, schedule: Schedule) -> Run:
    program = recorder.jit(lambda model, inputs: run(model, inputs, schedule))
    return lambda model, inputs: program(model, inputs)[0]

  return build


def gather(model: Model, inputs: Inputs, schedule: Schedule) -> Any:
  result = library.prefill(model.bind(), inputs, _keys(inputs.tokens), schedule)
  return result.logits, result.caches


def selecting(choose: Callable[[Array, int], Array]) -> Build:
  """The library's prefill with another operation that finds the highest scores."""

  def run(model: Model, inputs: Inputs, schedule: Schedule) -> Any:
    def stage(own: Stage, score: Callable[[View], Array]) -> Stage:
      def select(view: View, keep: int) -> Selection:
        return Selection(jnp.sort(choose(score(view), keep), axis=1))

      return dataclasses.replace(own, criterion=Criterion(select, own.criterion.cost))

    return gather(model, inputs, Schedule(tuple(map(stage, schedule.stages, SCORES))))

  return one_program(run)


def _keys(rows: Array) -> Array:
  return jax.random.split(jax.random.key(0), rows.shape[0])


def _embed(model: Model, inputs: Inputs) -> tuple[Embedded, Sequence]:
  embedded = model.bind().embed(inputs)
  return embedded, library.start(embedded)


def _layers(
  model: Model, sequence: Sequence, *, segment: Segment, visible: Bool[Array, "B S"] | None = None
) -> tuple[Sequence, list[tuple[Array, Array]], Projections]:
  hidden = None
  if visible is not None:
    batch, slots = visible.shape
    hidden = jnp.broadcast_to(visible[:, None, None], (batch, 1, slots, slots))
  layers = range(segment.first, segment.last)
  layout = sequence.layout
  x, projections = model.bind().language_model(sequence.x, sequence.positions, layers, layout=layout, mask=hidden)
  return sequence._replace(x=x), [(own.key, own.value) for own in projections], projections[-1]


def _prune(model: Model, sequence: Sequence, scored: Projections, embedded: Embedded, *, stage: Stage) -> Sequence:
  return library.prune(model.bind(), stage, sequence, scored, Context(_keys(sequence.x), embedded))[0]


def _logits(model: Model, sequence: Sequence) -> Float[Array, "B V"]:
  return library.last_logits(model.bind(), sequence)


STEPS = {"embed": _embed, "layers": _layers, "prune": _prune, "logits": _logits}


def in_steps(
  model: Model, inputs: Inputs, schedule: Schedule, **other_steps: Callable[..., Any]
) -> tuple[Float[Array, "B V"], list[tuple[Array, Array]]]:
  """Logits, and keys and values of all layers, of a prefill with some of `STEPS` replaced."""
  steps = types.SimpleNamespace(**STEPS | other_steps)
  embedded, sequence = steps.embed(model, inputs)
  keys_values = []
  for segment in schedule.segments(model.config.text.num_hidden_layers, inputs.layout.num_image_tokens):
    sequence, own, scored = steps.layers(model, sequence, segment=segment)
    keys_values += own
    if segment.stage is not None:
      sequence = steps.prune(model, sequence, scored, embedded, stage=segment.stage)
  return steps.logits(model, sequence), keys_values


def one_hot(model: Model, sequence: Sequence, *others: Any, stage: Stage) -> Sequence:
  """Prunes by multiplying hidden states with a matrix of zeros and ones instead of gathering them."""
  pruned = _prune(model, sequence, *others, stage=stage)
  matrix = _same_token(pruned.layout, sequence.layout).astype(sequence.x.dtype)
  x = jnp.einsum("BRS,BSD->BRD", matrix, sequence.x, preferred_element_type=jnp.float32)
  return pruned._replace(x=x.astype(sequence.x.dtype))


def mask(model: Model, inputs: Inputs, schedule: Schedule) -> Any:
  """Runs every token through every layer and hides dropped tokens from attention."""
  kept, visible = None, None

  def layers(model: Model, whole: Sequence, *, segment: Segment) -> Any:
    return _layers(model, whole, segment=segment, visible=visible)

  def prune(model: Model, whole: Sequence, scored: Projections, embedded: Embedded, *, stage: Stage) -> Sequence:
    nonlocal kept, visible
    slots = _same_token((kept or whole).layout, whole.layout).argmax(axis=2).astype(jnp.int32)
    scored = jax.tree.map(lambda x: take_slots(x, slots), scored)
    kept = _prune(model, (kept or whole)._replace(x=take_slots(whole.x, slots)), scored, embedded, stage=stage)
    visible = _same_token(kept.layout, whole.layout).any(axis=1)
    return whole

  return in_steps(model, inputs, schedule, layers=layers, prune=prune)


def scan(recorder: Recorder, schedule: Schedule) -> Run:
  """Runs the layers of a segment as one loop over stacked weights, except the last, which is scored."""
  stacked: dict[int, PyTree] = {}

  @recorder.jit
  def program(model: Model, stacked: dict[int, PyTree], inputs: Inputs) -> Any:
    text = model.config.text
    layer = DecoderLayer(text, model.network.kernels)

    def layers(model: Model, sequence: Sequence, *, segment: Segment) -> Any:
      rotation = rope.rotation(text.rope, text.head_dim, sequence.positions)

      def step(x: Array, weights: PyTree) -> tuple[Array, tuple[Array, Array]]:
        x, projections = layer.apply({"params": weights}, x, rotation, None)
        return x, (projections.key, projections.value)

      x, looped = jax.lax.scan(step, sequence.x, stacked[segment.first])
      last = dataclasses.replace(segment, first=segment.last - 1)
      sequence, keys_values, scored = _layers(model, sequence._replace(x=x), segment=last)
      return sequence, [looped, *keys_values], scored

    return in_steps(model, inputs, schedule, layers=layers)

  def call(model: Model, inputs: Inputs) -> Array:
    for segment in schedule.segments(model.config.text.num_hidden_layers, inputs.layout.num_image_tokens):
      if segment.first not in stacked:
        names = [f"layers_{index}" for index in range(segment.first, segment.last - 1)]
        stacked[segment.first] = jax.tree.map(_stack, *(model.params["language_model"][name] for name in names))
    return program(model, stacked, inputs)[0]

  return call


def by_segment(recorder: Recorder, schedule: Schedule, *, is_dynamic: bool = False) -> Run:
  """One program for every segment and one for every stage.

  If dynamic, stages keep the fewest tokens, in `GRANULE`s, that cover `COVERED` of the scores in every row.
  """

  def layers(model: Model, sequence: Sequence, *, segment: Segment) -> Any:
    sequence, _, scored = _layers(model, sequence, segment=segment)
    return sequence, [], scored

  steps = {name: recorder.jit(step) for name, step in (STEPS | {"layers": layers}).items()}

  @recorder.jit
  def wanted(
    model: Model, sequence: Sequence, scored: Projections, embedded: Embedded, *, stage: Stage
  ) -> Int[Array, ""]:
    context = Context(_keys(sequence.x), embedded)
    view = library.view(model.bind(), stage.layer, sequence, scored, context)
    score = SCORES[schedule.stages.index(stage)](view)
    covered = jnp.cumsum(-jnp.sort(-score, axis=1), axis=1)
    return (covered < COVERED * covered[:, -1:]).sum(axis=1).max() + 1

  def prune(model: Model, sequence: Sequence, *others: Any, stage: Stage) -> Sequence:
    keep = -(-int(wanted(model, sequence, *others, stage=stage)) // GRANULE) * GRANULE
    stage = dataclasses.replace(stage, keep=min(sequence.layout.num_image_tokens, keep))
    return steps["prune"](model, sequence, *others, stage=stage)

  used = steps | {"prune": prune} if is_dynamic else steps
  return lambda model, inputs: in_steps(model, inputs, schedule, **used)[0]


def _stack(*layers: Any) -> Any:
  if isinstance(layers[0], jax.ShapeDtypeStruct):
    own = layers[0].sharding
    spread = NamedSharding(own.mesh, PartitionSpec(None, *own.spec))
    return jax.ShapeDtypeStruct((len(layers), *layers[0].shape), layers[0].dtype, sharding=spread)
  return jnp.stack(layers)


def _same_token(layout: Layout, other: Layout) -> Bool[Array, "B R S"]:
  """Where two sequences hold the same token; padding matches nothing."""
  return (layout.order[:, :, None] == other.order[:, None]) & (other.order != UNUSED_ORDER)[:, None]


VARIANTS = {
  "gather": Variant(one_program(gather), "static counts, a gather, unrolled layers, one program: the library's own"),
  "mask": Variant(one_program(mask), "no token is removed; attention does not see what was not kept"),
  "one_hot": Variant(
    one_program(functools.partial(in_steps, prune=one_hot)), "a product with zeros and ones in place of the gather"
  ),
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
