"""himap_jax as a side of the comparison.

Axes: B batch, S slots, N query heads, K key heads, H head dim.
"""

import dataclasses
import functools
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints_convert.int8 import quantize_and_delete
from experiments.shared import geometries
from experiments.speed import side
from experiments.speed.side import NUM_SYSTEM_TOKENS, Job, Scenario, Side, Weights
from himap_jax.engine import programs, sharding
from himap_jax.engine.accounting import model_sizes
from himap_jax.engine.capacity import BatchSizes
from himap_jax.engine.decoding import DecodeConfig
from himap_jax.engine.engine import Batch, Engine, GenerationConfig
from himap_jax.engine.pool import Request
from himap_jax.engine.prefill import Context, Sequence, prune, start
from himap_jax.engine.prefill import prefill as run_prefill
from himap_jax.families import from_hf
from himap_jax.inputs import IMAGE, TEXT, Images, Inputs, Layout
from himap_jax.model.decoder import Projections
from himap_jax.model.network import Embedded, Model, Network, abstract_params
from himap_jax.model.quantization import map_int8
from himap_jax.pruning import cost
from himap_jax.pruning.schedule import Schedule

DTYPE = jnp.bfloat16


class Ours(Side):
  """A pruning method with its default schedule; `METHOD/int8` has int8 decoder weights."""

  def __init__(self, name: str, geometry: dict[str, Any], weights: pathlib.Path):
    method, _, variant = name.partition("/")
    self._config, self._mesh = from_hf(geometry), sharding.make_mesh()
    self._num_image_tokens = geometries.num_image_tokens(self._config)
    self._schedule = geometries.schedule_of(self._config, method)
    self._parameters = programs.method_parameters(self._schedule)
    file = Weights(weights)
    place = functools.partial(jax.device_put, device=sharding.replicated(self._mesh), may_alias=True)
    params = jax.tree_util.tree_map_with_path(
      lambda path, leaf: place(file.take(leaf.shape, path[-1].key)), abstract_params(self._config, DTYPE)
    )
    if variant:
      params = map_int8(quantize_and_delete, params)
    self._model = Model(params, Network(self._config, DTYPE, sharding.kernels_for(self._mesh)))
    self._options = dict(self._model.network.kernels.int8_compiler_options) if variant else {}
    self.mapped_bytes = sum(x.nbytes for x in jax.tree.leaves(params) if x.dtype == DTYPE and x.ndim > 1)
    self.device = jax.devices()[0].device_kind

  def prepare(self, scenario: Scenario) -> None:
    self._scenario, self.num_new_tokens = scenario, scenario.num_new_tokens
    self._inputs = self._make_inputs(scenario)
    self._engine = Engine(self._model, self._schedule, GenerationConfig(scenario.num_new_tokens, ignore_eos=True))
    model, schedule = self._model, self._schedule
    keys = jax.random.split(jax.random.key(0), scenario.batch_size)
    embedded = jax.jit(lambda model, inputs: model.bind().embed(inputs))(model, self._inputs)

    def prefill(model: Model, embedded: Embedded, keys: jax.Array, parameters: dict[str, Any]) -> Any:
      return run_prefill(model.bind(), embedded, keys, schedule, parameters)

    tower = jax.jit(lambda model, images: model.bind().encode_images(images)[0])
    prefill = jax.jit(prefill, compiler_options=self._options)
    parts = {
      "tower": functools.partial(tower, model, self._inputs.images),
      "prefill": functools.partial(prefill, model, embedded, keys, self._parameters),
    }
    if schedule != Schedule():
      choose = jax.jit(functools.partial(_choose, schedule=schedule))
      context = Context(keys, embedded, self._parameters)
      parts["scoring"] = functools.partial(choose, model, self._random_projections(), context)
    self.parts = {name: lambda part=part: jax.block_until_ready(part()) for name, part in parts.items()}
    self.turn()
    side.reset_peak_memory()

  def example(self) -> float:
    return self._engine(self._inputs, range(self._scenario.batch_size)).decode_seconds

  def job(self, job: Job) -> dict[str, float]:
    """If as many rows are prefilled as are decoded together, each batch is decoded to its end before the next begins."""
    sizes = BatchSizes(job.decode, job.prefill)
    generation = GenerationConfig(max(job.lengths), ignore_eos=True)
    engine = Engine(self._model, self._schedule, generation, batch_sizes=sizes)
    inputs = self._make_inputs(dataclasses.replace(job.scenario, batch_size=job.prefill))
    batches = [
      Batch(
        inputs, [Request(first + row, length) for row, length in enumerate(job.lengths[first : first + job.prefill])]
      )
      for first in range(0, len(job.lengths), job.prefill)
    ]
    is_static = job.prefill == job.decode
    start, count = time.perf_counter(), 0
    for group in [[batch] for batch in batches] if is_static else [batches]:
      count += sum(len(row.tokens) for turn in engine.answer(group) for row in turn)
    assert count == sum(job.lengths)
    return {
      "seconds": time.perf_counter() - start - engine.programs.seconds,
      "slots in use": engine.usage.row_steps / engine.usage.slot_steps,
      "prefill seconds": engine.usage.prefill_seconds,
      "programs": engine.programs.num_programs,
    }

  def accelerator_peak(self) -> int:
    stats = jax.devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats else 0

  def accounting(self) -> dict[str, float]:
    """Adds the bytes that a decoding step reads, as reported by XLA, and the weights and cache that it must read."""
    known, scenario, params = super().accounting(), self._scenario, self._model.params
    if scenario.num_new_tokens == 1:
      return known
    # Meant for more than two tokens: XLA counts a loop's body once, but unrolls a loop of one step.
    jitted = programs.Programs(self._model, self._schedule, DecodeConfig(scenario.num_new_tokens))
    seeds = np.zeros(scenario.batch_size, np.uint32)
    inputs, seeds = sharding.from_local_rows((self._inputs, seeds), self._mesh)
    lowered = jitted.lower(inputs, seeds, self._parameters, num_slots=scenario.batch_size)
    account = lowered.decode.compile().cost_analysis()
    read = dict(params["language_model"])
    if "lm_head" in params:
      read["embed_tokens"] = params["lm_head"]
    shape = geometries.image_shape(self._config)
    sizes = model_sizes(self._config, shape), self._schedule, self._num_image_tokens, scenario.num_text_tokens
    cache = scenario.batch_size * cost.costs(*sizes).cache_bytes
    return known | {
      "decode_bytes": account["bytes accessed"] - account["bytes accessedout{}"],
      "decode_bytes_needed": sum(x.nbytes for x in jax.tree.leaves(read)) + cache,
    }

  def _make_inputs(self, scenario: Scenario) -> Inputs:
    rng, (num_tiles, count) = np.random.default_rng(0), geometries.image_size(self._config)
    shape = (scenario.batch_size, scenario.num_text_tokens + count)
    slot = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    is_image = (slot >= NUM_SYSTEM_TOKENS) & (slot < NUM_SYSTEM_TOKENS + count)
    inputs = Inputs(
      tokens=rng.integers(2, self._config.text.vocab_size, shape, np.int32),
      layout=Layout.of_rows(np.where(is_image, IMAGE, TEXT), np.zeros_like(slot), count),
      positions=slot,
      images=Images(rng.standard_normal((shape[0], num_tiles, 3, *geometries.image_shape(self._config)), np.float32)),
    )
    return jax.tree.map(jnp.asarray, inputs)

  def _random_projections(self) -> list[Projections | None]:
    """The projections to score at each stage; None before the decoder."""
    text, projections = self._config.text, []
    for segment in self._schedule.segments(text.num_hidden_layers, self._num_image_tokens)[:-1]:
      shape = (self._scenario.batch_size, self._scenario.num_text_tokens + segment.num_image_tokens)
      query, key = (
        jax.random.normal(jax.random.key(heads), (*shape, heads, text.head_dim), DTYPE)
        for heads in (text.num_attention_heads, text.num_key_value_heads)
      )
      has_layers = segment.first < segment.last
      projections.append(Projections(query=query, key=key, value=key) if has_layers else None)
    return projections


def _choose(
  model: Model, projections: list[Projections | None], context: Context, *, schedule: Schedule
) -> list[Sequence]:
  """The stages of a schedule without the layers between them: the sequence after each."""
  network, sequences = model.bind(), [start(context.embedded)]
  for stage, scored in zip(schedule.stages, projections, strict=True):
    sequences.append(prune(network, stage, sequences[-1], scored, context)[0])
  return sequences[1:]
