"""Every platform's kernels: attention against torch's, and the gradients of what CPUs train with."""

import functools
import types
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
import torch
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from himap_jax.engine import sharding
from himap_jax.model.kernels import HIDDEN, Devices, cpu, gpu, masks, tpu, xla

SHAPES = {  # query slots, key slots, query heads, key heads
  "one block": (100, 100, 4, 4),
  "blocks and a rest": (cpu.BLOCK + 44, cpu.BLOCK + 44, 6, 2),
  "whole blocks": (2 * cpu.BLOCK, 2 * cpu.BLOCK, 3, 1),
  "one token": (1, 70, 6, 2),
}


def draw(shape, dtype=np.float32):
  queries, keys, num_heads, num_keys = shape
  rng = np.random.default_rng(0)
  sizes = ((queries, num_heads), (keys, num_keys), (keys, num_keys))
  return [(rng.normal(size=(2, *size, 16)) * 2).astype(dtype) for size in sizes]


def by_torch(query, key, value, mask=None, *, is_causal=False):
  """In float64."""
  query, key, value = (torch.tensor(np.asarray(x, np.float64)).transpose(1, 2) for x in (query, key, value))
  visible = torch.ones(query.shape[2], key.shape[2], dtype=bool)[None, None]
  if is_causal:
    visible = visible.tril()
  if mask is not None and mask.dtype == bool:
    visible = visible & torch.tensor(np.array(mask))
  elif mask is not None:
    visible = torch.tensor(np.asarray(mask, np.float64)).masked_fill(~visible, -torch.inf)
  context = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=visible, enable_gqa=True)
  return context.transpose(1, 2).numpy()


def random_mask(queries, keys):
  """Every query sees its own slot at least."""
  seen = np.random.default_rng(1).random((2, 1, queries, keys)) < 0.4
  return seen | np.eye(queries, keys, keys - queries, dtype=bool)


@pytest.mark.sampled
@pytest.mark.parametrize("attend", [xla.attention, cpu.attention])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_is_torch_s(attend, shape, masked):
  arrays = draw(shape)
  mask = random_mask(*shape[:2]) if masked else None
  for is_causal in (False, True) if shape[0] == shape[1] else (False,):
    actual = jax.jit(functools.partial(attend, is_causal=is_causal))(*arrays, mask)
    np.testing.assert_allclose(actual, by_torch(*arrays, mask, is_causal=is_causal), atol=5e-5, rtol=0)


def random_bias(mask):
  """What logits gain where they are seen, and −1e30 where they are not."""
  return np.where(mask, np.random.default_rng(4).normal(size=mask.shape), HIDDEN).astype(np.float32)


@pytest.mark.parametrize("attend", [xla.attention, cpu.attention])
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_mask_of_floats_is_added_to_the_logits(attend, is_causal):
  arrays, slots = draw(SHAPES["blocks and a rest"]), cpu.BLOCK + 44
  bias = random_bias(random_mask(slots, slots))
  actual = jax.jit(functools.partial(attend, is_causal=is_causal))(*arrays, bias)
  np.testing.assert_allclose(actual, by_torch(*arrays, bias, is_causal=is_causal), atol=5e-5, rtol=0)
  in_segments = functools.partial(attend, segments=random_segments(2, slots))
  same = masks.in_segments(None, random_segments(2, slots))
  expected = by_torch(*arrays, np.where(same, bias, HIDDEN))
  np.testing.assert_allclose(jax.jit(in_segments)(*arrays, bias), expected, atol=5e-5, rtol=0)


def random_segments(batch, slots):
  return jnp.asarray(np.random.default_rng(3).integers(-1, 4, (batch, slots)), jnp.int32)


@pytest.mark.parametrize("attend", [xla.attention, cpu.attention, gpu.attention])
def test_in_segments(attend):
  arrays, segments = draw(SHAPES["blocks and a rest"]), random_segments(2, cpu.BLOCK + 44)
  actual = jax.jit(functools.partial(attend, segments=segments))(*arrays)
  mask = (segments[:, :, None] == segments[:, None])[:, None]
  np.testing.assert_allclose(actual, by_torch(*arrays, mask), atol=5e-5, rtol=0)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=["one query head a key head", "three"])
@pytest.mark.parametrize("num_new", [1, 9])
@pytest.mark.parametrize("kernels", [xla, cpu], ids=["xla", "cpu"])
@pytest.mark.parametrize("of_floats", [False, True], ids=["mask", "mask of floats"])
def test_over_a_cache_is_torch_s(kernels, heads, num_new, of_floats):
  query, key, value = draw((1, 70, *heads))
  mask = random_bias(random_mask(1, 70)) if of_floats else random_mask(1, 70)
  prompt = (key[:, :-num_new].swapaxes(1, 2), value[:, :-num_new].transpose(0, 2, 3, 1), mask[..., :-num_new])
  new = (key[:, -num_new:].swapaxes(1, 2), value[:, -num_new:].swapaxes(1, 2), mask[..., -num_new:])
  actual = jax.jit(kernels.cache_attention)(query, prompt, new)
  np.testing.assert_allclose(actual, by_torch(query, key, value, mask), atol=5e-5, rtol=0)


def test_blocks_in_bfloat16_are_as_exact_as_xla_s():
  arrays = draw(SHAPES["blocks and a rest"], jnp.bfloat16)
  expected = by_torch(*arrays, is_causal=True)
  errors = []
  for attend in (cpu.attention, xla.attention):
    actual = jax.jit(functools.partial(attend, is_causal=True))(*arrays)
    assert actual.dtype == jnp.bfloat16
    errors.append(np.abs(np.asarray(actual, np.float64) - expected).max())
  assert errors[0] < max(1.2 * errors[1], 0.02)


def test_gradients_of_blocks():
  arrays = draw(SHAPES["blocks and a rest"])
  mask = jnp.asarray(random_mask(*SHAPES["blocks and a rest"][:2]))
  weight = np.random.default_rng(2).normal(size=arrays[0].shape).astype(np.float32)

  def gradients(attend):
    return jax.jit(jax.grad(lambda arrays: (attend(*arrays, mask, is_causal=True) * weight).sum()))(arrays)

  for actual, expected in zip(*map(gradients, (cpu.attention, xla.attention)), strict=True):
    np.testing.assert_allclose(actual, expected, atol=2e-4, rtol=0)


def devices(mesh, **options):
  return Devices(mesh, functools.partial(sharding.heads, mesh), **options)


SPLASH = {  # query and key heads, head dim, query slots, whether causal, in segments, masked
  "one query head a key head": ((2, 2), 64, 150, True, False, False),
  "two": ((4, 2), 64, 150, True, False, False),
  "segments": ((2, 2), 80, 150, False, True, False),
  "a mask": ((4, 2), 64, 40, False, False, True),
  "all of them": ((4, 2), 64, 150, True, True, True),
}


@pytest.mark.sampled
@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 4, "tensor": 2}], ids=["rows", "rows and heads"])
@pytest.mark.parametrize(
  ("heads", "head_dim", "queries", "is_causal", "in_segments", "masked"), SPLASH.values(), ids=SPLASH
)
def test_splash_is_torch_s(heads, head_dim, queries, is_causal, in_segments, masked, sizes):
  rng = np.random.default_rng(0)
  shapes = (queries, heads[0]), (150, heads[1]), (150, heads[1])
  arrays = [rng.normal(size=(8, *shape, head_dim)).astype(np.float32) for shape in shapes]
  segments = random_segments(8, 150) if in_segments else None
  mask = (rng.random((8, 1, queries, 150)) < 0.4) | np.eye(queries, 150, dtype=bool) if masked else None
  seen = None if segments is None else (segments[:, :, None] == segments[:, None])[:, None]
  seen = mask if seen is None else seen if mask is None else seen & mask
  mesh = sharding.make_mesh(**sizes)
  arrays = jax.device_put(arrays, sharding.rows(mesh))
  splash = functools.partial(tpu.attention, is_causal=is_causal, devices=devices(mesh, interpret=True))
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # the kernel's own
    actual = jax.jit(splash)(*arrays, mask, segments=segments)
  expected = PartitionSpec("data", None, "tensor" if "tensor" in sizes else None)
  assert actual.sharding.is_equivalent_to(NamedSharding(mesh, expected), 4)
  np.testing.assert_allclose(actual, by_torch(*arrays, seen, is_causal=is_causal), atol=2e-5, rtol=0)


def test_splash_lowers_for_tpu():
  arrays = [jax.ShapeDtypeStruct((2, 640, heads, 80), jnp.bfloat16) for heads in (8, 2, 2)]
  splash = functools.partial(tpu.attention, devices=devices(sharding.make_mesh(data=2)))

  def lowered(**arguments):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
      traced = jax.jit(functools.partial(splash, **arguments)).trace(*arrays)
    return traced.lower(lowering_platforms=("tpu",)).as_text()

  assert "tpu_custom_call" in lowered(is_causal=True)
  assert "tpu_custom_call" in lowered(segments=jnp.zeros((2, 640), jnp.int32))
  assert "tpu_custom_call" in lowered(mask=jnp.ones((2, 1, 640, 640), bool))
  assert "tpu_custom_call" not in lowered(is_causal=False)
  assert "tpu_custom_call" not in lowered(mask=jnp.zeros((2, 1, 640, 640)), is_causal=True)


def test_cudnn_takes_what_it_can(monkeypatch):
  taken = []

  def record(query, *arguments, implementation=None, **settings):
    taken.append(implementation)
    return query

  monkeypatch.setattr(jax.nn, "dot_product_attention", record)
  half, single = (jnp.ones((1, 4, 2, 64), dtype) for dtype in (jnp.bfloat16, jnp.float32))
  gpu.attention(half, half, half, is_causal=True)
  gpu.attention(half, half, half)
  gpu.attention(single, single, single, is_causal=True)
  gpu.attention(half, half, half, jnp.ones((1, 1, 4, 4), bool))
  gpu.attention(*[jnp.ones((1, 4, 2, 60), jnp.bfloat16)] * 3)
  assert taken == ["cudnn", "cudnn", None, "cudnn", None]
  mesh, wide = sharding.make_mesh(), [jnp.ones((1, 4, 2, 256), jnp.bfloat16)] * 3  # Gemma 3's heads
  for generation in (8, 9):
    gpu.kernels(mesh, functools.partial(sharding.heads, mesh), generation).attention(*wide)
  assert taken[5:] == [None, "cudnn"]


@pytest.mark.parametrize("heads", [(8, 8), (8, 2)], ids=["one query head a key head", "four"])
@pytest.mark.parametrize("arguments", ["causal", "mask", "mask of floats", "segments"])
def test_cudnn_lowers_for_gpus(heads, arguments, monkeypatch):
  """With cuDNN's version given, since it is not installed; a mask of either kind is a bias of its attention."""
  monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91_200)
  query, key = (jax.ShapeDtypeStruct((2, 75, count, 80), jnp.bfloat16) for count in heads)
  own = {
    "causal": {"is_causal": True},
    "mask": {"mask": jnp.ones((2, 1, 75, 75), bool), "is_causal": True},
    "mask of floats": {"mask": jnp.ones((2, 1, 75, 75)), "is_causal": True},
    "segments": {"segments": jnp.zeros((2, 75), jnp.int32)},
  }[arguments]
  lowered = jax.jit(functools.partial(gpu.attention, **own)).trace(query, key, key).lower(lowering_platforms=("cuda",))
  text = lowered.as_text()
  assert ("__cudnn$fmhaSoftmax(" in text) == (arguments == "causal")
  assert ("__cudnn$fmhaScaleBiasSoftmax(" in text) == (arguments != "causal")


@pytest.mark.parametrize(
  ("platform", "capability", "expected"),
  [
    ("cpu", None, cpu.attention),
    ("tpu", None, tpu.attention),
    ("gpu", "9.0", gpu.attention),
    ("gpu", "10.3", gpu.attention),
    ("gpu", "7.5", xla.attention),
    ("gpu", "gfx90a", xla.attention),
  ],
)
def test_every_platform_has_one(platform, capability, expected, monkeypatch):
  device = types.SimpleNamespace(platform=platform)
  if capability:
    device.compute_capability = capability
  mesh = unittest.mock.Mock(spec=Mesh, devices=np.array([device]))
  monkeypatch.setattr(sharding, "heads", lambda mesh, num_heads, num_key_heads: "spec")
  kernels = sharding.kernels_for.__wrapped__(mesh)
  attend = kernels.attention
  assert getattr(attend, "func", attend) is expected
  assert (kernels.received_attention(600) is not None) == (expected in (gpu.attention, tpu.attention))
  if platform == "tpu":
    own, spec_of, _ = attend.keywords["devices"]
    assert own is mesh and spec_of(4, 2) == "spec"


@pytest.mark.sampled
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("int8", [False, True], ids=["plain", "int8"])
def test_products_are_numpy_s(rows, dtype, int8):
  """One slot a row and several; int8 weights are the weights that their integers and scales stand for."""
  rng = np.random.default_rng(0)
  weight = rng.normal(size=(40, 64)).astype(np.float32)
  x = (rng.normal(size=(rows, 3, 64)) * np.exp(rng.normal(size=64))).astype(dtype)
  stored = weight.astype(dtype)
  exact = stored.astype(np.float64)
  if int8:
    stored = qwix.quantize(jnp.asarray(weight), jnp.int8, channelwise_axes=(0,))
    exact = np.asarray(stored.qvalue, np.float64) * np.asarray(stored.scale, np.float64)
  for kernels in (xla, cpu):
    for slots in (x, x[:, :1]):
      expected = np.asarray(slots, np.float64) @ exact.T
      actual = jax.jit(kernels.product)(slots, stored)
      assert actual.dtype == jnp.float32
      np.testing.assert_allclose(actual, expected, atol=3e-4 * np.abs(expected).max(), rtol=0)
