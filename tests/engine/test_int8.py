"""Models with int8 weights: only the weights are rounded, and a row's result is its own, whatever shares its batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
import tiny_checkpoints

from himap_jax import GenerationConfig, InputConfig, checkpoint, generate
from himap_jax.engine import sharding
from himap_jax.engine.engine import Engine
from himap_jax.model.kernels import cpu
from himap_jax.model.linear import matmul


@pytest.fixture(scope="module")
def int8(checkpoints, tmp_path_factory):
  """Returns `int8(batch_size)`: `dinov2_shrunk` with int8 weights on as many devices as divide the rows."""
  opened = checkpoint.open_checkpoint(
    str(checkpoints("dinov2_shrunk").directory), cache_dir=tmp_path_factory.mktemp("cache")
  )

  def load(batch_size):
    mesh = sharding.make_mesh(data=max(size for size in range(1, 9) if batch_size % size == 0))
    return opened.restore(dtype=jnp.float32, mesh=mesh, int8_weights=True)

  return load


def dequantized(loaded):
  """The same model with the numbers that its int8 weights stand for."""
  is_int8 = lambda leaf: isinstance(leaf, qwix.QArray)  # noqa: E731
  params = jax.tree.map(
    lambda x: x.qvalue.astype(jnp.float32) * jnp.broadcast_to(x.scale, x.shape) if is_int8(x) else x,
    loaded.model.params,
    is_leaf=is_int8,
  )
  return dataclasses.replace(loaded, model=loaded.model.replace(params=params))


def test_only_the_weights_are_rounded(int8, images):
  """PyramidDrop also reads projections of the next layer."""
  loaded = int8(2)
  schedule = loaded.schedule("pyramiddrop", (1, 3), (8, 3))
  generation, inputs = GenerationConfig(4, ignore_eos=True), InputConfig(prompt_buckets=(64,), batch_size=2)
  options = dict(schedule=schedule, generation=generation, inputs=inputs)
  rounded, exact = (
    generate(model, images[:2], ["What is it?", "Why?"], **options) for model in (loaded, dequantized(loaded))
  )
  for one, other in zip(rounded, exact, strict=True):
    assert one.token_ids == other.token_ids and one.kept == other.kept
    np.testing.assert_allclose(
      one.first_logits, other.first_logits, atol=2e-3 * np.abs(other.first_logits).max(), rtol=0
    )


def test_a_row_alone_is_a_row_beside_another(int8, checkpoints, images):
  """PyramidDrop reads one slot's queries, which a product of one slot computes."""
  tiny = checkpoints("dinov2_shrunk")
  rows = [tiny.encode(image, "<s>USER: <image>\nWhat is it? ASSISTANT:") for image in images[:2]]
  results = []
  for group in (rows, rows[:1]):
    loaded = int8(len(group))
    engine = Engine(loaded.model, loaded.schedule("pyramiddrop", (1, 3), (8, 3)), GenerationConfig(4, ignore_eos=True))
    results.append(engine(tiny_checkpoints.pad_batch(group, 64), range(len(group))))
  beside, alone = results
  assert beside.tokens[0] == alone.tokens[0] and beside.kept[0][0] == alone.kept[0][0]
  np.testing.assert_allclose(beside.logits[0], alone.logits[0], atol=1e-5 * np.abs(alone.logits).max(), rtol=0)


def test_weights_are_converted_when_they_are_needed():
  weight = jax.device_put(jnp.zeros((512, 512)), sharding.replicated(sharding.make_mesh()))
  weights = [qwix.quantize(weight, jnp.int8, channelwise_axes=(0,)) for _ in range(8)]

  def chain(x, weights):
    for weight in weights:
      x = matmul(x, weight, cpu.KERNELS)
    return x

  x = jnp.zeros((1, 16, 512), jnp.bfloat16)
  options = dict(cpu.KERNELS.int8_compiler_options)
  compiled = jax.jit(chain, compiler_options=options).lower(x, weights).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 4 * 512 * 512 * x.dtype.itemsize
