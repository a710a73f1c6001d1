"""FLOPs against the figures that HiMAP prints and against sums written out layer by layer and product by product."""

import math

import pytest

from himap_jax import flops
from himap_jax.config import RopeConfig, TextConfig
from himap_jax.methods import build_schedule
from himap_jax.schedule import Schedule

N = 576


def text_config(hidden, intermediate, layers, heads, key_heads=None, head_dim=None):
  return TextConfig(
    vocab_size=32_064,
    hidden_size=hidden,
    intermediate_size=intermediate,
    num_hidden_layers=layers,
    num_attention_heads=heads,
    num_key_value_heads=key_heads or heads,
    head_dim=head_dim or hidden // heads,
    rms_norm_eps=1e-5,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
    attention_bias=False,
    mlp_bias=False,
    hidden_act="silu",
    rope=RopeConfig(theta=10_000.0),
  )


LLAVA_7B = text_config(4096, 11_008, 32, 32)
LLAVA_13B = text_config(5120, 13_824, 40, 40)
GQA = text_config(96, 160, 12, 6, key_heads=2, head_dim=24)


def himap(config, prune_layers=(2, 8), keep=(288, 72)):
  return build_schedule(
    "himap", num_layers=config.num_hidden_layers, num_image_tokens=N, prune_layers=prune_layers, keep=keep
  )


def image_tokens_at(layer, prune_layers, keep):
  return [N, *keep][sum(layer >= stage for stage in prune_layers)]


@pytest.mark.parametrize("config, share", [(LLAVA_7B, "24.6%"), (LLAVA_13B, "22.2%")])
def test_share_that_the_paper_gives(config, share):
  pruned, plain = (flops.image_token_flops(config, s, N) for s in (himap(config), Schedule()))
  assert f"{pruned / plain:.1%}" == share


@pytest.mark.parametrize("config", [LLAVA_7B, LLAVA_13B, GQA])
@pytest.mark.parametrize("prune_layers, keep", [((2, 8), (288, 72)), ((1, 11), (575, 1))])
def test_image_tokens_layer_by_layer(config, prune_layers, keep):
  d, m = config.hidden_size, config.intermediate_size
  expected = 0
  for layer in range(config.num_hidden_layers):
    n = image_tokens_at(layer, prune_layers, keep)
    expected += 4 * n * d * d + 2 * n * n * d + 2 * n * d * m
  assert flops.image_token_flops(config, himap(config, prune_layers, keep), N) == expected


def product(rows, inner, columns):
  """Multiplications of [rows, inner] @ [inner, columns]."""
  return rows * inner * columns


@pytest.mark.parametrize("config", [LLAVA_7B, LLAVA_13B, GQA])
@pytest.mark.parametrize("num_text_tokens", [1, 55, 170])
def test_all_tokens_product_by_product(config, num_text_tokens):
  d, m, h = config.hidden_size, config.intermediate_size, config.head_dim
  expected = 0
  for layer in range(config.num_hidden_layers):
    n = image_tokens_at(layer, (2, 8), (288, 72)) + num_text_tokens
    expected += product(n, d, config.num_attention_heads * h)  # queries
    expected += 2 * product(n, d, config.num_key_value_heads * h)  # keys and values
    for _ in range(config.num_attention_heads):
      expected += product(n, h, n) + product(n, n, h)  # scores, then their mean of the values
    expected += product(n, config.num_attention_heads * h, d)  # output
    expected += 2 * product(n, d, m) + product(n, m, d)  # gate and up, then down
  assert flops.all_token_flops(config, himap(config), N, num_text_tokens) == expected


@pytest.mark.parametrize("num_text_tokens", [35 + 20, 35 + 60, 35 + 135])
def test_share_of_all_tokens(num_text_tokens):
  pruned, plain = (flops.all_token_flops(LLAVA_7B, s, N, num_text_tokens) for s in (himap(LLAVA_7B), Schedule()))
  assert 0.305 <= pruned / plain <= 0.425


def test_keeping_everything_costs_what_no_pruning_does():
  everything = himap(LLAVA_7B, keep=(N, N))
  assert flops.image_token_flops(LLAVA_7B, everything, N) == flops.image_token_flops(LLAVA_7B, Schedule(), N)
  assert flops.all_token_flops(LLAVA_7B, everything, N, 60) == flops.all_token_flops(LLAVA_7B, Schedule(), N, 60)


def test_cache_bytes_layer_by_layer():
  for config in (LLAVA_7B, GQA):
    expected = 0
    for layer in range(config.num_hidden_layers):
      slots = image_tokens_at(layer, (2, 8), (288, 72)) + 96
      expected += 2 * math.prod((slots, config.num_key_value_heads, config.head_dim, 2))
    assert flops.cache_bytes(config, himap(config), N, 96, bytes_per_value=2) == expected


def test_frozen_layers():
  """By hand, for one layer of each kind: 3 image and 2 text tokens, width 4, two heads of 2, one key head, ffn 8."""
  config = text_config(4, 8, 2, 2, key_heads=1, head_dim=2)
  schedule = Schedule(frozen_layers=(1,))
  updated_layer = 4 * 3 * 16 + 2 * 9 * 4 + 2 * 3 * 4 * 8
  assert flops.image_token_flops(config, schedule, 3) == updated_layer + 2 * 3 * 16
  first = 2 * (5 * 4 * 4) + 2 * (5 * 4 * 2) + 2 * (5 * 5 * 4) + 3 * (5 * 4 * 8)
  second = 2 * (2 * 4 * 4) + 2 * (5 * 4 * 2) + 2 * (2 * 5 * 4) + 3 * (2 * 4 * 8)
  assert flops.all_token_flops(config, schedule, 3, 2) == first + second


def test_tokens_pruned_before_the_decoder_cost_nothing():
  schedule = build_schedule("uniform", num_layers=32, num_image_tokens=N, keep=(64,))
  assert flops.image_token_flops(LLAVA_7B, schedule, N) == flops.image_token_flops(LLAVA_7B, Schedule(), 64)
  assert flops.all_token_flops(LLAVA_7B, schedule, N, 60) == flops.all_token_flops(LLAVA_7B, Schedule(), 64, 60)
