"""The attention that slots receive from some rows, in blocks and in a kernel, against NumPy over all rows at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from himap_jax.engine import sharding
from himap_jax.model.kernels import Devices, gpu, tpu
from himap_jax.model.kernels.received import received, received_from_heads
from himap_jax.pruning import scoring
from himap_jax.pruning.methods import fitprune

B, Q, S, H = 4, 150, 300, 64  # more rows than a block has, and no multiple of it
BLOCKS = functools.partial(scoring.received_by_slots, scale=H**-0.5)


def case(num_heads, num_key_heads, num_rows=Q):
  rng = np.random.default_rng(0)
  query = rng.normal(size=(B, num_rows, num_heads, H)).astype(np.float32)
  key = rng.normal(size=(B, S, num_key_heads, H)).astype(np.float32)
  visible, valid = rng.random((B, num_rows, S)) < 0.5, rng.random((B, num_rows)) < 0.8
  visible[:, :, 3] = True
  visible[:, -1], valid[:, -1] = num_rows == 1, num_rows == 1  # a row that fills a batch, if there are others
  return query, key, visible, valid


def by_numpy(query, key, visible, valid):
  """The attention of every valid row and head, and zeros: `[B, N, Q, S]`."""
  key = np.repeat(key, query.shape[2] // key.shape[2], axis=2)
  logits = np.einsum("BQNH,BSNH->BNQS", query.astype(np.float64), key) * H**-0.5
  weights = np.where(visible[:, None], np.exp(logits), 0)
  shares = weights / np.maximum(weights.sum(axis=-1, keepdims=True), 1e-30)
  return shares * valid[:, None, :, None]


@pytest.mark.parametrize("num_rows", [1, scoring.BLOCK, Q])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=["one query head a key head", "two"])
def test_blocks_of_rows_are_all_rows(heads, num_rows):
  query, key, visible, valid = case(*heads, num_rows)
  actual = jax.jit(BLOCKS)(query, key, visible, valid)
  expected = by_numpy(query, key, visible, valid).mean(axis=1).sum(axis=1)
  np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=0)


def test_no_array_has_the_attention_of_all_rows():
  shapes = (B, 640, 8, H), (B, 700, 8, H), (B, 640, 700), (B, 640)
  arrays = map(jax.ShapeDtypeStruct, shapes, (jnp.float32, jnp.float32, bool, bool))
  memory = jax.jit(BLOCKS).lower(*arrays).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 0.7 * 4 * B * 8 * 640 * 700  # float32


CONFIGS = {"tpu": tpu.RECEIVED, "gpu": gpu.RECEIVED}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("sizes", [{"data": 4}, {"data": 2, "tensor": 2}], ids=["rows", "rows and heads"])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=["one query head a key head", "two"])
def test_the_kernel_is_numpy_s(heads, sizes, config):
  mesh = sharding.make_mesh(**sizes)
  arrays = case(*heads)
  devices = Devices(mesh, functools.partial(sharding.heads, mesh), interpret=True)
  actual = jax.jit(functools.partial(received, scale=H**-0.5, devices=devices, config=config))(
    *jax.device_put(arrays, sharding.rows(mesh))
  )
  assert actual.sharding.is_equivalent_to(sharding.rows(mesh), 2)
  np.testing.assert_allclose(actual, by_numpy(*arrays).mean(axis=1).sum(axis=1), atol=1e-5, rtol=0)


def test_wide_heads_have_smaller_blocks_on_gpus(monkeypatch):
  mesh, blocks, pallas_call = sharding.make_mesh(data=4), [], pl.pallas_call

  def record(*arguments, in_specs, **options):
    blocks.append(in_specs[0].block_shape[2])
    return pallas_call(*arguments, in_specs=in_specs, **options)

  monkeypatch.setattr(pl, "pallas_call", record)
  devices = Devices(mesh, functools.partial(sharding.heads, mesh), interpret=True)
  query, key, visible, valid = case(2, 2, 40)
  query, key = (np.tile(x, 4) for x in (query, key))
  by_gpu = functools.partial(received, scale=H**-0.5, devices=devices, config=gpu.RECEIVED)
  actual = jax.jit(by_gpu)(query, key, visible, valid)
  np.testing.assert_allclose(actual, by_numpy(query, key, visible, valid).mean(axis=1).sum(axis=1), atol=1e-5, rtol=0)
  jax.eval_shape(by_gpu, query.astype(jnp.bfloat16), key.astype(jnp.bfloat16), visible, valid)
  assert blocks == [32, 64]


@pytest.mark.parametrize("head_dim", [64, 80, 256])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_heads_of_any_size(config, head_dim):
  query, key, visible, valid = case(4, 2)
  query, key = (np.tile(x, 4)[..., :head_dim] for x in (query, key))
  actual = jax.jit(functools.partial(received_from_heads, scale=H**-0.5, config=config, interpret=True))(
    query, key, visible, valid
  )
  np.testing.assert_allclose(actual, by_numpy(query, key, visible, valid).sum(axis=(1, 2)), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("platform", "call"), [("tpu", "tpu_custom_call"), ("cuda", "xla.gpu.triton")])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_the_kernel_lowers(platform, call, dtype, head_dim):
  config = CONFIGS["gpu" if platform == "cuda" else platform]
  shapes = (B, Q, 4, head_dim), (B, S, 2, head_dim), (B, Q, S), (B, Q)
  arrays = map(jax.ShapeDtypeStruct, shapes, (dtype, dtype, bool, bool))
  traced = jax.jit(functools.partial(received_from_heads, scale=0.125, config=config)).trace(*arrays)
  assert call in traced.lower(lowering_platforms=(platform,)).as_text()


def test_fitprune_takes_the_highest_of_the_heads():
  query, key, visible, valid = case(4, 2)
  actual = jax.jit(lambda *arrays: fitprune.highest_by_slots(*arrays, H**-0.5))(query, key, visible, valid)
  expected = by_numpy(query, key, visible, valid).max(axis=1).sum(axis=1)
  np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=0)
