"""Weights of eight bits against NumPy's integers, and a model that has them against the one it came from."""

import jax
import jax.numpy as jnp
import numpy as np
import qwix
import tiny_checkpoints

from himap_jax import checkpoint, linear, quantization
from himap_jax.generation import generate
from himap_jax.methods import build_schedule

RNG = np.random.default_rng(0)


def integers(x):
  """Symmetric int8 of the last axis, whose steps reach half a step beyond the largest, and the scales."""
  scale = np.abs(x).max(axis=-1, keepdims=True) / 127.5
  return np.clip(np.round(x / scale), -128, 127).astype(np.int64), scale


def test_one_token_is_a_product_of_integers():
  x, weight = RNG.normal(size=(3, 1, 64)).astype(np.float32), RNG.normal(size=(40, 64)).astype(np.float32)
  quantized = quantization.quantize(jnp.asarray(weight))
  (x8, x_scale), (w8, w_scale) = integers(x), integers(weight)
  np.testing.assert_array_equal(quantized.qvalue, w8)
  np.testing.assert_allclose(quantized.scale, w_scale, rtol=1e-6)
  actual = jax.jit(linear.product)(jnp.asarray(x), quantized)
  np.testing.assert_allclose(actual, (x8 @ w8.T) * x_scale * w_scale[:, 0], rtol=1e-5, atol=1e-5)
  hlo = jax.jit(linear.product).lower(jnp.asarray(x), quantized).as_text()
  assert "xi8>" in hlo.partition("dot_general")[2].partition("\n")[0]


def test_many_tokens_keep_their_precision():
  x, weight = RNG.normal(size=(2, 5, 64)).astype(np.float32), RNG.normal(size=(40, 64)).astype(np.float32)
  w8, w_scale = integers(weight)
  actual = jax.jit(linear.product)(jnp.asarray(x), quantization.quantize(jnp.asarray(weight)))
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
