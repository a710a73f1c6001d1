"""Every implementation of attention against torch's, and the gradients of what CPUs train with."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec

from himap_jax import attention, sharding

SHAPES = {  # query slots, key slots, query heads, key heads
  "one block": (100, 100, 4, 4),
  "blocks and a rest": (attention.BLOCK + 44, attention.BLOCK + 44, 6, 2),
  "whole blocks": (2 * attention.BLOCK, 2 * attention.BLOCK, 3, 1),
  "one token": (1, 70, 6, 2),
}


def draw(shape, dtype=np.float32):
  queries, keys, num_heads, num_keys = shape
  rng = np.random.default_rng(0)
  sizes = ((queries, num_heads), (keys, num_keys), (keys, num_keys))
  return [jnp.asarray(rng.normal(size=(2, *size, 16)) * 2, dtype) for size in sizes]


def by_torch(query, key, value, mask=None, *, is_causal=False):
  """In float64."""
  query, key, value = (torch.tensor(np.asarray(x, np.float64)).transpose(1, 2) for x in (query, key, value))
  visible = torch.ones(query.shape[2], key.shape[2], dtype=bool)[None, None]
  if is_causal:
    visible = visible.tril()
  if mask is not None:
    visible = visible & torch.tensor(np.array(mask))
  context = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=visible, enable_gqa=True)
  return context.transpose(1, 2).numpy()


def random_mask(queries, keys):
  """Every query sees its own slot at least."""
  seen = np.random.default_rng(1).random((2, 1, queries, keys)) < 0.4
  return jnp.asarray(seen | np.eye(queries, keys, keys - queries, dtype=bool))


@pytest.mark.parametrize("attend", [attention.xla_attention, attention.blockwise_attention])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_is_torch_s(attend, shape, masked):
  arrays = draw(shape)
  mask = random_mask(*shape[:2]) if masked else None
  for is_causal in (False, True) if shape[0] == shape[1] else (False,):
    actual = jax.jit(functools.partial(attend, is_causal=is_causal))(*arrays, mask)
    np.testing.assert_allclose(actual, by_torch(*arrays, mask, is_causal=is_causal), atol=5e-5, rtol=0)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=["one query head a key head", "three"])
@pytest.mark.parametrize("num_new", [1, 9])
def test_over_a_cache_is_torch_s(heads, num_new):
  query, key, value = draw((1, 70, *heads))
  mask = random_mask(1, 70)
  prompt = (key[:, :-num_new].swapaxes(1, 2), value[:, :-num_new].transpose(0, 2, 3, 1), mask[..., :-num_new])
  new = (key[:, -num_new:].swapaxes(1, 2), value[:, -num_new:].swapaxes(1, 2), mask[..., -num_new:])
  actual = jax.jit(attention.attend_to_cache)(query, *prompt, *new)
  np.testing.assert_allclose(actual, by_torch(query, key, value, mask), atol=5e-5, rtol=0)


def test_blocks_in_bfloat16_are_as_exact_as_xla_s():
  arrays = draw(SHAPES["blocks and a rest"], jnp.bfloat16)
  expected = by_torch(*(x.astype(jnp.float32) for x in arrays), is_causal=True)
  errors = []
  for attend in (attention.blockwise_attention, attention.xla_attention):
    actual = jax.jit(functools.partial(attend, is_causal=True))(*arrays)
    assert actual.dtype == jnp.bfloat16
    errors.append(np.abs(np.asarray(actual, np.float64) - expected).max())
  assert errors[0] < max(1.2 * errors[1], 0.02)


def test_gradients_of_blocks():
  arrays = draw(SHAPES["blocks and a rest"])
  mask = random_mask(*SHAPES["blocks and a rest"][:2])
  weight = jnp.asarray(np.random.default_rng(2).normal(size=arrays[0].shape), jnp.float32)

  def gradients(attend):
    return jax.grad(lambda arrays: (attend(*arrays, mask, is_causal=True) * weight).sum())(arrays)

  for actual, expected in zip(*map(gradients, (attention.blockwise_attention, attention.xla_attention)), strict=True):
    np.testing.assert_allclose(actual, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 4, "tensor": 2}], ids=["rows", "rows and heads"])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=["one query head a key head", "two"])
def test_splash_is_torch_s(heads, sizes):
  rng = np.random.default_rng(0)
  arrays = [jnp.asarray(rng.normal(size=(8, 150, n, 64)), jnp.float32) for n in (heads[0], heads[1], heads[1])]
  mesh = sharding.make_mesh(**sizes)
  arrays = jax.device_put(arrays, sharding.rows(mesh))
  splash = functools.partial(attention.splash_attention, is_causal=True, mesh=mesh, interpret=True)
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # the kernel's own
    actual = jax.jit(splash)(*arrays)
  expected = PartitionSpec("data", None, "tensor" if "tensor" in sizes else None)
  assert actual.sharding.is_equivalent_to(NamedSharding(mesh, expected), 4)
  np.testing.assert_allclose(actual, by_torch(*arrays, is_causal=True), atol=2e-5, rtol=0)


def test_splash_lowers_for_tpu():
  arrays = [jax.ShapeDtypeStruct((2, 640, heads, 128), jnp.bfloat16) for heads in (8, 2, 2)]
  splash = functools.partial(attention.splash_attention, mesh=sharding.make_mesh(data=2))

  def lowered(**arguments):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
      traced = jax.jit(functools.partial(splash, **arguments)).trace(*arrays)
    return traced.lower(lowering_platforms=("tpu",)).as_text()

  assert "tpu_custom_call" in lowered(is_causal=True)
  assert "tpu_custom_call" not in lowered(is_causal=False)


def test_cudnn_takes_what_it_can(monkeypatch):
  taken = []

  def record(query, *arguments, implementation=None, **settings):
    taken.append(implementation)
    return query

  monkeypatch.setattr(jax.nn, "dot_product_attention", record)
  half, single = (jnp.ones((1, 4, 2, 64), dtype) for dtype in (jnp.bfloat16, jnp.float32))
  attention.cudnn_attention(half, half, half, is_causal=True)
  attention.cudnn_attention(half, half, half)
  attention.cudnn_attention(single, single, single, is_causal=True)
  attention.cudnn_attention(half, half, half, jnp.ones((1, 1, 4, 4), bool))
  attention.cudnn_attention(*[jnp.ones((1, 4, 2, 60), jnp.bfloat16)] * 3)
  assert taken == ["cudnn", "cudnn", None, None, None]


@pytest.mark.parametrize(
  ("platform", "capability", "expected"),
  [
    ("cpu", None, "blockwise_attention"),
    ("tpu", None, "splash_attention"),
    ("gpu", "9.0", "cudnn_attention"),
    ("gpu", "10.3", "cudnn_attention"),
    ("gpu", "7.5", "xla_attention"),
    ("gpu", "gfx90a", "xla_attention"),
  ],
)
def test_every_platform_has_one(platform, capability, expected):
  device = types.SimpleNamespace(platform=platform)
  if capability:
    device.compute_capability = capability
  mesh = types.SimpleNamespace(devices=np.array([device]))
  attend = attention.for_mesh.__wrapped__(mesh)
  assert getattr(attend, "func", attend) is getattr(attention, expected)
  if platform == "tpu":
    assert attend.keywords == {"mesh": mesh}
