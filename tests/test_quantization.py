"""Weights of eight bits against NumPy's integers, and a model that has them against the one it came from."""

import jax
import jax.numpy as jnp
import numpy as np
import qwix
import tiny_checkpoints

from himap_jax import checkpoint, linear, quantization, sharding
from himap_jax.generation import generate
from himap_jax.methods import build_schedule
from himap_jax.programs import compiler_options

RNG = np.random.default_rng(0)


def quantized(weight):
  """The integers and the scales of a quantised weight, after a look at them: every number is at the nearest step."""
  array = quantization.quantize(jnp.asarray(weight))
  assert array.qvalue.dtype == jnp.int8
  integers, scale = np.asarray(array.qvalue, np.int64), np.asarray(array.scale, np.float64)
  np.testing.assert_allclose(scale, np.abs(weight).max(axis=1, keepdims=True) / 127.5, rtol=1e-6)
  assert (np.abs(integers * scale - weight) <= 0.5001 * scale).all()
  return array, integers, scale


def test_one_token_is_a_product_of_integers():
  x, weight = RNG.normal(size=(3, 1, 64)).astype(np.float32), RNG.normal(size=(40, 64)).astype(np.float32)
  x[:, :, 7] = 5.0  # the largest, at 127.5 steps
  array, w8, w_scale = quantized(weight)
  x_scale = 5.0 / 127.5
  x8 = np.minimum(np.round(x / x_scale), 127).astype(np.int64)
  actual = jax.jit(linear.product)(jnp.asarray(x), array)
  np.testing.assert_allclose(actual, (x8 @ w8.T) * x_scale * w_scale[:, 0], rtol=1e-5, atol=1e-5)
  hlo = jax.jit(linear.product).lower(jnp.asarray(x), array).as_text()
  assert "xi8>" in hlo.partition("dot_general")[2].partition("\n")[0]


def test_many_tokens_keep_their_precision():
  x, weight = RNG.normal(size=(2, 5, 64)).astype(np.float32), RNG.normal(size=(40, 64)).astype(np.float32)
  array, w8, w_scale = quantized(weight)
  actual = jax.jit(linear.product)(jnp.asarray(x), array)
  np.testing.assert_allclose(actual, x @ (w8 * w_scale).T, rtol=1e-4, atol=1e-4)


def test_a_model(checkpoints, loaded, images, tmp_path):
  plain = loaded("clip_mha")
  opened = checkpoint.open_checkpoint(str(checkpoints("clip_mha").directory), cache_dir=tmp_path)
  eight = opened.restore(dtype=jnp.float32, quantize_decoder=True)
  assert eight.dtype == jnp.float32
  kinds = jax.tree.map(lambda _, q: isinstance(q, qwix.QArray), plain.params, eight.params)
  layer = kinds["language_model"]["layers_0"]
  assert layer["self_attn"]["q_proj"]["weight"] and layer["mlp"]["down_proj"]["weight"] and kinds["lm_head"]["weight"]
  assert sum(jax.tree.leaves(kinds)) == 7 * tiny_checkpoints.LLAMA["num_hidden_layers"] + 1
  schedule = build_schedule("himap", num_layers=6, num_image_tokens=16, prune_layers=(2, 4), keep=(8, 3))
  settings = {"schedule": schedule, "max_new_tokens": 4, "prompt_buckets": (64,), "batch_size": 2, "ignore_eos": True}
  answers = [generate(model, images[:2], ["What is it?", "Why?"], **settings) for model in (plain, eight)]
  for exact, rounded in zip(*answers, strict=True):
    assert len(rounded.token_ids) == 4
    correlation = np.corrcoef(exact.first_logits, rounded.first_logits)[0, 1]
    assert 0.95 < correlation < 1 - 1e-7


def test_weights_are_converted_when_they_are_needed():
  weight = jax.device_put(jnp.zeros((512, 512)), sharding.replicated(sharding.make_mesh()))
  weights = [quantization.quantize(weight) for _ in range(8)]

  def chain(x, weights):
    for weight in weights:
      x = linear.matmul(x, weight)
    return x

  x = jnp.zeros((1, 16, 512), jnp.bfloat16)
  compiled = jax.jit(chain, compiler_options=compiler_options(weights)).lower(x, weights).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 4 * 512 * 512 * x.dtype.itemsize
