"""Generation: a prefill program and a decode program per input shape, compiled once.

Axes: B rows, S slots, M new tokens, V vocabulary.
"""

import dataclasses
import functools
import time
import zlib
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Bool, Float, Int, Key
from PIL import Image

from himap_jax import attention, sharding
from himap_jax.cache import SegmentCache
from himap_jax.checkpoint import LoadedModel
from himap_jax.linear import is_quantized
from himap_jax.llava import Inputs, Llava
from himap_jax.prefill import prefill
from himap_jax.processing import DEFAULT_BUCKETS, Processor
from himap_jax.sampling import Sampling, choose
from himap_jax.schedule import Schedule


@flax.struct.dataclass
class DecodeState:
  """What the decode loop carries.

  Attributes:
    step: scalar, tokens generated so far.
    tokens: `[B, M]` the generated tokens, 0 where there is none.
    last: `[B]` the newest token.
    finished: `[B]` whether the row has ended.
    num_tokens: `[B]` tokens of the row, the one that ended it included.
    caches: one a segment.
  """

  step: Int[Array, ""]
  tokens: Int[Array, "B M"]
  last: Int[Array, "B"]
  finished: Bool[Array, "B"]
  num_tokens: Int[Array, "B"]
  caches: tuple[SegmentCache, ...]


def decode(
  model: Llava,
  params: Any,
  logits: Float[Array, "B V"],
  caches: tuple[SegmentCache, ...],
  next_position: Int[Array, "B"],
  keys: Key[Array, "B"],
  *,
  max_new_tokens: int,
  sampling: Sampling,
  eos_token_ids: tuple[int, ...],
) -> tuple[Int[Array, "B M"], Int[Array, "B"], tuple[SegmentCache, ...]]:
  """Generates from prefilled caches until every row has ended or has `max_new_tokens`.

  Args:
    model: the model.
    params: its parameters.
    logits: of the prompts' last tokens.
    caches: prefilled, with room for `max_new_tokens`.
    next_position: the rotary position of each row's first new token.
    keys: a random key a row.
    max_new_tokens: M; static.
    sampling: how tokens are chosen; static.
    eos_token_ids: tokens that end a row; static.

  Returns:
    The tokens, how many of each row count, and the caches, so that a caller who donates them has them updated in place.
  """
  bound = model.bind({"params": params})

  def ended(token: Int[Array, "B"]) -> Bool[Array, "B"]:
    return functools.reduce(jnp.logical_or, [token == eos for eos in eos_token_ids], jnp.zeros_like(token, dtype=bool))

  def step(state: DecodeState) -> DecodeState:
    positions = (next_position + state.step - 1)[:, None]
    with jax.named_scope("decode"):
      x, caches = bound.language_model.extend(state.last[:, None], positions, state.caches, model.dtype)
      token = choose(sampling, bound.logits(x)[:, 0], keys, state.step)
    token = jnp.where(state.finished, 0, token)
    return DecodeState(
      step=state.step + 1,
      tokens=jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.step, axis=1),
      last=token,
      finished=state.finished | ended(token),
      num_tokens=state.num_tokens + (~state.finished).astype(jnp.int32),
      caches=caches,
    )

  first = choose(sampling, logits, keys, jnp.int32(0))
  tokens = jnp.zeros((first.shape[0], max_new_tokens), jnp.int32)
  state = DecodeState(
    step=jnp.int32(1),
    tokens=tokens.at[:, 0].set(first),
    last=first,
    finished=ended(first),
    num_tokens=jnp.ones_like(first),
    caches=caches,
  )
  state = jax.lax.while_loop(lambda s: (s.step < max_new_tokens) & ~s.finished.all(), step, state)
  return state.tokens, state.num_tokens, state.caches


@dataclasses.dataclass(frozen=True)
class Generation:
  """The result of one batch, on the host.

  Attributes:
    tokens: for each row its generated token ids, the one that ended it included.
    kept: for each stage `[B, keep]` kept image tokens, ascending.
    logits: `[B, V]` float32, of the first generated token.
    prefill_seconds: wall time of the prefill program for the batch.
    decode_seconds: wall time of the decode program for the batch.
  """

  tokens: list[list[int]]
  kept: tuple[np.ndarray, ...]
  logits: np.ndarray
  prefill_seconds: float
  decode_seconds: float


def compiler_options(params: Any) -> dict[str, str]:
  """What XLA is told about the programs of these parameters."""
  on_cpu = jax.tree.leaves(params)[0].sharding.mesh.devices.flat[0].platform == "cpu"
  if on_cpu and any(map(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized))):
    # It would convert all quantised weights as soon as a program begins, and hold them all.
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
  return {}


@functools.lru_cache(maxsize=32)
def _programs_of(*settings: Any) -> dict[tuple[int, ...], tuple[Any, Any]]:
  """The compiled prefill and decode programs of the same settings by input shape, shared by all generators."""
  del settings
  return {}


class Generator:
  """Runs batches through the compiled programs of one model, schedule and way of sampling.

  Attributes:
    num_programs: programs compiled so far.
    compile_seconds: time spent compiling them or reading them from the persistent cache.
  """

  def __init__(
    self,
    loaded: LoadedModel,
    schedule: Schedule,
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    ignore_eos: bool = False,
  ):
    if max_new_tokens < 1:
      raise ValueError(f"max_new_tokens must be at least 1, but is {max_new_tokens}")
    self._params = loaded.params
    mesh = jax.tree.leaves(loaded.params)[0].sharding.mesh
    self._model = Llava(loaded.config, loaded.dtype, attention.for_mesh(mesh))
    self._rows = sharding.rows(mesh)
    self._seed = seed
    eos_token_ids = () if ignore_eos else loaded.eos_token_ids
    types = jax.tree.structure(loaded.params)  # tells quantised weights from others
    self._compiled = _programs_of(self._model, types, schedule, max_new_tokens, sampling, eos_token_ids, self._rows)
    self.num_programs = 0
    self.compile_seconds = 0.0

    def prefill_program(params: Any, inputs: Inputs, keys: Any) -> Any:
      return prefill(self._model, params, inputs, keys, schedule, max_new_tokens)

    def decode_program(params: Any, logits: Any, caches: Any, next_position: Any, keys: Any) -> Any:
      return decode(
        self._model,
        params,
        logits,
        caches,
        next_position,
        keys,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eos_token_ids=eos_token_ids,
      )

    options = compiler_options(loaded.params)
    self._prefill = jax.jit(prefill_program, compiler_options=options)
    self._decode = jax.jit(decode_program, compiler_options=options, donate_argnames="caches")

  def __call__(self, inputs: Inputs, row_ids: Sequence[int | str]) -> Generation:
    """Generates for a batch.

    Args:
      inputs: the batch.
      row_ids: one a row; with the seed they make each row's random key, whatever the batch it is in.
    """
    keys = jax.vmap(jax.random.key)(np.array([zlib.crc32(f"{self._seed}/{i!r}".encode()) for i in row_ids], np.uint32))
    keys, sampling_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    inputs, keys, sampling_keys = jax.device_put((inputs, keys, sampling_keys), self._rows)
    prefill_program, decode_program = self._programs(inputs, keys)
    start = time.perf_counter()
    result = jax.block_until_ready(prefill_program(self._params, inputs, keys))
    middle = time.perf_counter()
    kept, logits = jax.device_get((result.kept, result.logits))
    tokens, num_tokens, _ = decode_program(
      self._params, result.logits, result.caches, result.next_position, sampling_keys
    )
    tokens, num_tokens = jax.device_get((tokens, num_tokens))
    end = time.perf_counter()
    return Generation(
      tokens=[row[:count].tolist() for row, count in zip(tokens, num_tokens, strict=True)],
      kept=kept,
      logits=logits,
      prefill_seconds=middle - start,
      decode_seconds=end - middle,
    )

  def _programs(self, inputs: Inputs, keys: Key[Array, "B"]) -> tuple[Any, Any]:
    shape = inputs.tokens.shape
    if shape not in self._compiled:
      start = time.perf_counter()
      lowered = self._prefill.lower(self._params, inputs, keys)
      prefill_program = lowered.compile()
      result = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        lowered.out_info,
        prefill_program.output_shardings,
      )
      decode_program = self._decode.lower(
        self._params, result.logits, result.caches, result.next_position, keys
      ).compile()
      self._compiled[shape] = prefill_program, decode_program
      self.num_programs += 2
      self.compile_seconds += time.perf_counter() - start
      logging.info("ready: programs of shape %s", shape)
    return self._compiled[shape]


@dataclasses.dataclass(frozen=True)
class Answer:
  """An answer.

  Attributes:
    text: without special tokens.
    token_ids: the generated tokens, the one that ended the answer included.
    kept: for each stage the kept image tokens as indices 0 … N − 1, ascending.
    first_logits: `[V]` float32 logits of the first generated token.
  """

  text: str
  token_ids: list[int]
  kept: list[list[int]]
  first_logits: np.ndarray


def generate(
  loaded: LoadedModel,
  images: Sequence[Image.Image],
  questions: Sequence[str],
  *,
  schedule: Schedule = Schedule(),
  max_new_tokens: int = 32,
  temperature: float = 0.0,
  top_p: float = 1.0,
  seed: int = 0,
  ignore_eos: bool = False,
  prompt_template: str = "chat",
  prompt_buckets: Sequence[int] = DEFAULT_BUCKETS,
  batch_size: int = 8,
) -> list[Answer]:
  """Answers questions about images, one image a question.

  Args:
    loaded: the model.
    images: RGB pictures.
    questions: as many.
    schedule: where and how image tokens are pruned; nowhere by default.
    max_new_tokens: the longest answer, in tokens.
    temperature: 0 is greedy.
    top_p: nucleus of sampling.
    seed: of sampling.
    ignore_eos: whether to go on to `max_new_tokens` whatever comes.
    prompt_template: `vicuna_v1`, `chat` or a literal with `<image>` and `{question}`.
    prompt_buckets: padded text lengths.
    batch_size: rows per batch.

  Raises:
    ValueError: settings that contradict each other or the model, or a prompt that it cannot take.
  """
  processor = Processor(
    loaded.processor, loaded.config, template=prompt_template, buckets=prompt_buckets, max_new_tokens=max_new_tokens
  )
  generator = Generator(
    loaded,
    schedule,
    max_new_tokens=max_new_tokens,
    sampling=Sampling(temperature, top_p),
    seed=seed,
    ignore_eos=ignore_eos,
  )
  examples = [processor.prepare(image, question) for image, question in zip(images, questions, strict=True)]
  answers: dict[int, Answer] = {}
  for bucket in processor.buckets:
    rows = [i for i, example in enumerate(examples) if processor.bucket(example) == bucket]
    for first in range(0, len(rows), batch_size):
      group = rows[first : first + batch_size]
      inputs = processor.batch([examples[i] for i in group], bucket=bucket, batch_size=batch_size)
      result = generator(inputs, [*group, *[group[-1]] * (batch_size - len(group))])
      for row, i in enumerate(group):
        answers[i] = Answer(
          text=processor.decode(result.tokens[row]),
          token_ids=result.tokens[row],
          kept=[stage[row].tolist() for stage in result.kept],
          first_logits=result.logits[row],
        )
  return [answers[i] for i in range(len(examples))]
