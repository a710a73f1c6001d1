"""FLOPs against the figures that HiMAP prints and against sums written out layer by layer and product by product."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
import reference_himap

from experiments.shared import geometries
from himap_jax import PruningConfig, Schedule, build_schedule
from himap_jax.engine import programs, sharding
from himap_jax.engine.accounting import method_inputs, model_sizes
from himap_jax.engine.prefill import prefill
from himap_jax.engine.programs import method_parameters
from himap_jax.inputs import ImageSize
from himap_jax.model.network import Model, Network, abstract_params
from himap_jax.pruning.cost import costs
from himap_jax.pruning.methods import METHODS

N, PICTURE = 576, (336, 336)


def config_of(hidden, intermediate, layers, heads, key_heads=None, head_dim=None):
  """LLaVA-1.5-7B with a decoder of other sizes, and a tower of three layers."""
  base = geometries.model_of("7b")
  text = dataclasses.replace(
    base.text,
    hidden_size=hidden,
    intermediate_size=intermediate,
    num_hidden_layers=layers,
    num_attention_heads=heads,
    num_key_value_heads=key_heads or heads,
    head_dim=head_dim or hidden // heads,
  )
  return dataclasses.replace(base, vision=dataclasses.replace(base.vision, feature_layers=(3,)), text=text)


def sizes_of(*sizes, **more):
  return model_sizes(config_of(*sizes, **more), PICTURE)


LLAVA_7B = sizes_of(4096, 11_008, 32, 32)
LLAVA_13B = sizes_of(5120, 13_824, 40, 40)
GQA = sizes_of(96, 160, 12, 6, key_heads=2, head_dim=24)


def himap(sizes, prune_layers=(2, 8), keep=(288, 72)):
  return build_schedule("himap", num_layers=sizes.num_layers, num_image_tokens=N, prune_layers=prune_layers, keep=keep)


def image_tokens_at(layer, prune_layers, keep):
  return [N, *keep][sum(layer >= stage for stage in prune_layers)]


@pytest.mark.parametrize("sizes, share", [(LLAVA_7B, "24.6%"), (LLAVA_13B, "22.2%")])
def test_share_that_the_paper_gives(sizes, share):
  pruned, plain = (costs(sizes, s, N, 0).image_tokens for s in (himap(sizes), Schedule()))
  assert f"{pruned / plain:.1%}" == share


@pytest.mark.parametrize("sizes", [LLAVA_7B, LLAVA_13B, GQA])
@pytest.mark.parametrize("prune_layers, keep", [((2, 8), (288, 72)), ((1, 11), (575, 1))])
def test_image_tokens_layer_by_layer(sizes, prune_layers, keep):
  d, m = sizes.hidden_size, sizes.intermediate_size
  expected = 0
  for layer in range(sizes.num_layers):
    n = image_tokens_at(layer, prune_layers, keep)
    expected += 4 * n * d * d + 2 * n * n * d + 2 * n * d * m
  assert costs(sizes, himap(sizes, prune_layers, keep), N, 0).image_tokens == expected


def product(rows, inner, columns):
  """Multiplications of [rows, inner] @ [inner, columns]."""
  return rows * inner * columns


@pytest.mark.parametrize("sizes", [LLAVA_7B, LLAVA_13B, GQA])
@pytest.mark.parametrize("num_text_tokens", [1, 55, 170])
def test_all_tokens_product_by_product(sizes, num_text_tokens):
  d, m, h = sizes.hidden_size, sizes.intermediate_size, sizes.head_dim
  expected = 0
  for layer in range(sizes.num_layers):
    n = image_tokens_at(layer, (2, 8), (288, 72)) + num_text_tokens
    expected += product(n, d, sizes.num_heads * h)  # queries
    expected += 2 * product(n, d, sizes.num_key_heads * h)  # keys and values
    for _ in range(sizes.num_heads):
      expected += product(n, h, n) + product(n, n, h)  # scores, then their mean of the values
    expected += product(n, sizes.num_heads * h, d)  # output
    expected += 2 * product(n, d, m) + product(n, m, d)  # gate and up, then down
  assert costs(sizes, himap(sizes), N, num_text_tokens).decoder == expected


@pytest.mark.parametrize("num_text_tokens", [35 + 20, 35 + 60, 35 + 135])
def test_share_of_all_tokens(num_text_tokens):
  pruned, plain = (costs(LLAVA_7B, s, N, num_text_tokens).decoder for s in (himap(LLAVA_7B), Schedule()))
  assert 0.305 <= pruned / plain <= 0.425


def test_keeping_everything_costs_what_no_pruning_does():
  everything = himap(LLAVA_7B, keep=(N, N))
  assert costs(LLAVA_7B, everything, N, 0).image_tokens == costs(LLAVA_7B, Schedule(), N, 0).image_tokens
  assert costs(LLAVA_7B, everything, N, 60).decoder == costs(LLAVA_7B, Schedule(), N, 60).decoder


def test_cache_bytes_layer_by_layer():
  for sizes in (LLAVA_7B, GQA):
    expected = 0
    for layer in range(sizes.num_layers):
      slots = image_tokens_at(layer, (2, 8), (288, 72)) + 96
      expected += 2 * math.prod((slots, sizes.num_key_heads, sizes.head_dim, 2))
    assert costs(sizes, himap(sizes), N, 96).cache_bytes == expected


def test_frozen_layers():
  """By hand, for one layer of each kind: 3 image and 2 text tokens, width 4, two heads of 2, one key head, ffn 8."""
  sizes = sizes_of(4, 8, 2, 2, key_heads=1, head_dim=2)
  schedule = Schedule(frozen_layers=(1,))
  updated_layer = 4 * 3 * 16 + 2 * 9 * 4 + 2 * 3 * 4 * 8
  assert costs(sizes, schedule, 3, 0).image_tokens == updated_layer + 2 * 3 * 16
  first = 2 * (5 * 4 * 4) + 2 * (5 * 4 * 2) + 2 * (5 * 5 * 4) + 3 * (5 * 4 * 8)
  second = 2 * (2 * 4 * 4) + 2 * (5 * 4 * 2) + 2 * (2 * 5 * 4) + 3 * (2 * 4 * 8)
  assert costs(sizes, schedule, 3, 2).decoder == first + second


def test_tokens_pruned_before_the_decoder_cost_nothing():
  schedule = build_schedule("uniform", num_layers=32, num_image_tokens=N, keep=(64,))
  assert costs(LLAVA_7B, schedule, N, 0).image_tokens == costs(LLAVA_7B, Schedule(), 64, 0).image_tokens
  assert costs(LLAVA_7B, schedule, N, 60).decoder == costs(LLAVA_7B, Schedule(), 64, 60).decoder


# LLaVA-1.5-7B with fewer layers, so that it is traced quickly; its widths are what matters.
SHALLOW = config_of(4096, 11_008, 6, 32)
TEN_LAYERS = sizes_of(4096, 11_008, 10, 32)
LAYERS = {
  "himap": (2, 4),
  "himap_adaptive": (2, 4),
  "pyramiddrop": (1, 3, 5),
  "sparsevlm": (1, 3, 5),
  "shortv": (1, 3, 5),
  "visipruner": (2, 4),
  "divprune+himap": (0, 2, 4),
}


@pytest.mark.sampled
@pytest.mark.parametrize(
  "method", [*(name for name in METHODS if name not in reference_himap.ABLATIONS), "divprune+himap"]
)
def test_prefill_is_what_xla_counts(method):
  schedule = build_schedule(method, num_layers=6, num_image_tokens=N, prune_layers=LAYERS.get(method))
  counted = counted_by_xla(SHALLOW, schedule, PICTURE, num_text_tokens=60)
  assert costs(model_sizes(SHALLOW, PICTURE), schedule, N, 60).prefill == pytest.approx(counted, rel=0.005)


@pytest.mark.sampled
@pytest.mark.parametrize(
  "name, side, size, tolerance",
  [
    ("internvl_7b", 336, ImageSize(1, 576), 0.005),
    ("qwen_vl_7b", 448, ImageSize(1, 256), 0.005),
    ("llava_next_7b", 336, ImageSize(5, 2340), 0.01),
    ("llava_onevision_0.5b", 384, ImageSize(5, 2929), 0.01),
    ("internvl3_1b", 448, ImageSize(1, 256), 0.015),
    ("smolvlm_256m", 512, ImageSize(1, 64), 0.015),
    ("gemma3_4b", 896, ImageSize(1, 256), 0.01),
    ("qwen2_vl_2b", 448, ImageSize(1024, 256), 0.005),
    ("qwen2_5_vl_3b", 448, ImageSize(1024, 256), 0.005),
    ("qwen3_vl_2b", 512, ImageSize(1024, 256), 0.005),
  ],
)
def test_prefill_of_other_models_is_what_xla_counts(name, side, size, tolerance):
  """With fewer layers, so that the towers count. The narrower a model, the more XLA counts besides products."""
  config = geometries.model_of(name)
  layers = config.vision.deepstack_layers and (0, 1, 2)
  config = dataclasses.replace(
    config,
    vision=dataclasses.replace(config.vision, feature_layers=(3,), deepstack_layers=layers),
    text=dataclasses.replace(config.text, num_hidden_layers=3),
  )
  assert geometries.image_size(config) == size
  actual = costs(model_sizes(config, (side, side)), Schedule(), size.num_tokens, 60, num_pictures=size.num_tiles)
  assert actual.tower + actual.projector > actual.decoder / 10
  assert actual.prefill == pytest.approx(counted_by_xla(config, Schedule(), (side, side), 60, size), rel=tolerance)


@pytest.mark.parametrize("method, layers, keep", [("none", None, None), ("fastv", (3,), (1601,))])
def test_prefill_with_cross_attention_is_what_xla_counts(method, layers, keep):
  """Llama-3.2-Vision's, with fewer layers; all four tiles of a picture with the padding of each."""
  config = geometries.model_of("mllama_11b")
  assert (config.num_image_tokens(560, 560), config.vision.num_features) == (6404, 7680)
  tiling = dataclasses.replace(config.vision.tiling, num_global_layers=1)
  config = dataclasses.replace(
    config,
    vision=dataclasses.replace(config.vision, tiling=tiling, num_hidden_layers=3, feature_layers=(1, 1, 1, 1, 1, 3)),
    text=dataclasses.replace(config.text, num_hidden_layers=5, cross_attention_layers=(1, 4)),
  )
  schedule = PruningConfig(method, layers, keep).schedule(num_image_tokens=6404, **method_inputs(config))
  sizes = model_sizes(config, (560, 560))
  actual = costs(sizes, schedule, 6404, 60, num_pictures=4)
  assert actual.prefill == pytest.approx(counted_by_xla(config, schedule, (560, 560), 60), rel=0.015)  # 3e9 softmaxes
  last = 6404 if keep is None else keep[0]
  assert actual.image_tokens == (6404 + last) * 2 * 4096**2
  assert actual.cache_bytes == (3 * 60 + 6404 + last) * 2 * 1024 * 2
  layer = 2 * 4096 * 4096 + 3 * 4096 * 14_336
  text = 3 * (layer + 2 * 4096 * 1024 + 2 * 61 * 4096)
  assert actual.decode == text + 2 * layer + 2 * (6404 + last) * 4096 + actual.head


def counted_by_xla(config, schedule, image_shape, num_text_tokens, size=None):
  """Multiplications of one row's prefill."""
  model = Model(abstract_params(config, jnp.bfloat16), Network(config, jnp.bfloat16))
  inputs, _ = programs.abstract_inputs(
    config, sharding.make_mesh(), batch_size=1, num_text_slots=num_text_tokens, image_shape=image_shape, size=size
  )
  inputs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), inputs)
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
  program = jax.jit(lambda model, inputs, keys, values: prefill(model.bind(), inputs, keys, schedule, values))
  return program.lower(model, inputs, keys, method_parameters(schedule)).cost_analysis()["flops"] / 2


def test_costs_of_no_pruning_at_7b():
  """Written out: 576 image and 60 text tokens, 10 layers of 4096, a tower of 3 layers of 1024."""
  actual = costs(TEN_LAYERS, Schedule(), N, 60)
  assert actual.tower == 3 * (4 * 577 * 1024**2 + 2 * 577**2 * 1024 + 2 * 577 * 1024 * 4096) + 576 * 588 * 1024
  assert actual.projector == 576 * (1024 * 4096 + 4096**2)
  assert actual.head == 4096 * 32_064
  assert actual.decode == 10 * (4 * 4096**2 + 2 * 637 * 4096 + 3 * 4096 * 11_008) + actual.head
  assert actual.scoring == 0
  assert actual.cache_bytes == 10 * 636 * 2 * 4096 * 2
  assert (actual.mean_tokens_in, actual.mean_tokens_out) == (576, 576)


def test_mean_image_tokens():
  """HiMAP at 2, 8 on ten layers: 2 × 576, 6 × 288 and 2 × 72 enter; a layer before a stage lets fewer out."""
  schedule = build_schedule("himap", num_layers=10, num_image_tokens=N)
  actual = costs(TEN_LAYERS, schedule, N, 60)
  assert actual.mean_tokens_in == (2 * 576 + 6 * 288 + 2 * 72) / 10
  assert actual.mean_tokens_out == (1 * 576 + 6 * 288 + 3 * 72) / 10
  assert actual.scoring == 60 * 636 * 4096 + 288 * 348 * 4096


def test_costs_of_a_row_with_its_own_counts():
  """Those of the schedule that gives every row the same counts."""
  adaptive = build_schedule("himap_adaptive", num_layers=10, num_image_tokens=N)
  fixed = build_schedule("himap", num_layers=10, num_image_tokens=N, keep=(144, 36))
  row = adaptive.with_counts((144, 36))
  assert [stage.keep for stage in adaptive.stages] == [432, 216]
  assert [(stage.layer, stage.keep) for stage in row.stages] == [(2, 144), (8, 36)]
  assert costs(TEN_LAYERS, row, N, 60) == costs(TEN_LAYERS, fixed, N, 60)
