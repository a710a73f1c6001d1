"""himap_jax's side of a benchmark.

Axes: B batch, S slots, M image tokens here, N query heads, K key heads, H head dim.
"""

import functools
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import geometries
from experiments.benchmark import side
from experiments.benchmark.scenarios import NUM_SYSTEM_TOKENS, Scenario
from experiments.benchmark.weights import Weights
from himap_jax import attention, flops, programs, sharding
from himap_jax.checkpoint import LoadedModel
from himap_jax.config import from_hf
from himap_jax.decoder import Projections
from himap_jax.generation import Generator
from himap_jax.llava import Inputs, Llava, abstract_params
from himap_jax.prefill import Embedded, Sequence, prefill_embedded, prune, start
from himap_jax.programs import compiler_options
from himap_jax.quantization import quantize_decoder
from himap_jax.schedule import Schedule

DTYPE = jnp.bfloat16


class Ours:
  """One of our methods with its default schedule; `METHOD/int8` has the decoder's weights in eight bits."""

  def __init__(self, name: str, geometry: dict[str, Any], weights: pathlib.Path):
    method, _, variant = name.partition("/")
    self._config = from_hf(geometry)
    self._mesh = sharding.make_mesh()
    self._model = Llava(self._config, DTYPE, attention.for_mesh(self._mesh))
    self._num_image_tokens = geometries.num_image_tokens(self._config)
    self._schedule = geometries.schedule_of(self._config, method)
    file = Weights(weights)
    place = functools.partial(jax.device_put, device=sharding.replicated(self._mesh), may_alias=True)
    self._params = jax.tree_util.tree_map_with_path(
      lambda path, leaf: place(_values(path[-1].key, leaf.shape, file)), abstract_params(self._config, DTYPE)
    )
    if variant:
      self._params = quantize_decoder(self._params)
    self._mapped_bytes = sum(x.nbytes for x in jax.tree.leaves(self._params) if x.dtype == DTYPE and x.ndim > 1)
    self.device = jax.devices()[0].device_kind

  def prepare(self, scenario: Scenario) -> None:
    """Compiles the programs of a scenario and makes its inputs."""
    loaded = LoadedModel(self._config, self._params, None, pathlib.Path(), ())
    self._generator = Generator(loaded, self._schedule, max_new_tokens=scenario.num_new_tokens, ignore_eos=True)
    self._inputs = self._make_inputs(scenario)
    self._row_ids = range(scenario.batch_size)
    self._num_new_tokens, self._num_text_tokens = scenario.num_new_tokens, scenario.num_text_tokens
    model, schedule = self._model, self._schedule
    keys = jax.random.split(jax.random.key(0), scenario.batch_size)
    embed = jax.jit(lambda params, inputs: model.bind({"params": params}).embed(inputs))
    embedded = embed(self._params, self._inputs)
    self._tower = functools.partial(
      jax.jit(lambda params, pixels: model.bind({"params": params}).encode_images(pixels)[0]),
      self._params,
      self._inputs.pixel_values,
    )
    self._prefill = functools.partial(
      jax.jit(
        lambda params, embedded, keys: prefill_embedded(model, params, embedded, keys, schedule),
        compiler_options=compiler_options(self._params),
      ),
      self._params,
      embedded,
      keys,
    )
    self._scoring = functools.partial(
      jax.jit(functools.partial(_choose, model, schedule)),
      self._params,
      embedded,
      self._random_projections(embedded),
      keys,
    )
    self.turn()
    side.reset_peak_memory()

  def turn(self) -> dict[str, float]:
    """Runs a whole example; where it is one token, the tower, the prefill after it and the choosing alone too."""
    figures = {}
    if self._num_new_tokens == 1:
      figures["tower"] = side.seconds(lambda: jax.block_until_ready(self._tower()))
      figures["prefill"] = side.seconds(lambda: jax.block_until_ready(self._prefill()))
      if self._schedule != Schedule():
        figures["scoring"] = side.seconds(lambda: jax.block_until_ready(self._scoring()))
    start = time.perf_counter()
    result = self._generator(self._inputs, self._row_ids)
    figures["example"] = time.perf_counter() - start
    if self._num_new_tokens > 1:
      figures["decode"] = result.decode_seconds / (self._num_new_tokens - 1)
    return figures

  def accounting(self) -> dict[str, float]:
    """Bytes that a decode step reads by XLA's account, and the weights and the cache that it has to read."""
    if self._num_new_tokens == 1:
      return {}
    # Of more than two tokens: XLA counts the loop's body once, and unrolls a loop of one.
    jitted = programs.make_programs(
      self._config, self._mesh, self._schedule, DTYPE, self._num_new_tokens, options=compiler_options(self._params)
    )
    seeds = np.zeros(len(self._row_ids), np.uint32)
    inputs, seeds = sharding.from_local_rows((self._inputs, seeds), self._mesh)
    compiled = programs.lower(jitted, self._params, inputs, seeds).decode.compile()
    read = dict(self._params["language_model"])
    if "lm_head" in self._params:
      read["embed_tokens"] = self._params["lm_head"]
    cache = flops.cache_bytes(
      self._config.text, self._schedule, self._num_image_tokens, self._num_text_tokens, bytes_per_value=2
    )
    account = compiled.cost_analysis()
    return {
      "decode_bytes": account["bytes accessed"] - account["bytes accessedout{}"],
      "decode_bytes_needed": sum(x.nbytes for x in jax.tree.leaves(read)) + len(self._row_ids) * cache,
    }

  def peak_bytes(self) -> int:
    """Of the accelerator, or of the process where there is none."""
    stats = jax.devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats else side.peak_memory(self._mapped_bytes)

  def _make_inputs(self, scenario: Scenario) -> Inputs:
    rng = np.random.default_rng(0)
    batch, num_slots = scenario.batch_size, scenario.num_text_tokens + self._num_image_tokens
    tokens = rng.integers(2, self._config.text.vocab_size, (batch, num_slots), np.int32)
    pixels = rng.standard_normal((batch, 3, *[self._config.vision.image_size] * 2), np.float32)
    return Inputs(
      tokens=jnp.asarray(tokens),
      length=jnp.full(batch, num_slots, jnp.int32),
      image_start=jnp.full(batch, NUM_SYSTEM_TOKENS, jnp.int32),
      pixel_values=jnp.asarray(pixels),
    )

  def _random_projections(self, embedded: Embedded) -> list[Projections | None]:
    """What the layer before each stage would give to score; nothing before the decoder."""
    text, x = self._config.text, embedded[0]
    projections = []
    for segment in self._schedule.segments(text.num_hidden_layers, self._num_image_tokens)[:-1]:
      if segment.first == segment.last:
        projections.append(None)
        continue
      removed = self._num_image_tokens - segment.num_image_tokens
      shape = (x.shape[0], x.shape[1] - removed)
      query, key = (
        jax.random.normal(jax.random.key(heads), (*shape, heads, text.head_dim), DTYPE)
        for heads in (text.num_attention_heads, text.num_key_value_heads)
      )
      projections.append(Projections(query=query, key=key, value=key))
    return projections


def _values(name: str, shape: tuple[int, ...], file: Weights) -> np.ndarray:
  if len(shape) == 1:
    return np.full(shape, name != "bias", DTYPE)
  return file.take(shape)


def _choose(
  model: Llava,
  schedule: Schedule,
  params: Any,
  embedded: Embedded,
  projections: list[Projections | None],
  keys: jax.Array,
) -> list[Sequence]:
  """The stages of a schedule without the layers between them: what each leaves."""
  bound = model.bind({"params": params})
  sequences = [start(embedded)]
  for stage, scored in zip(schedule.stages, projections, strict=True):
    sequences.append(prune(bound, stage, sequences[-1], scored, embedded, keys))
  return sequences[1:]
