"""LLaVA-1.5 at its true sizes, by shapes alone: every parameter, and the bytes of the cache with and without pruning."""

import json
import math
import re

import jax
import jax.numpy as jnp
import pytest
import torch
import transformers

from experiments.shared import geometries
from himap_jax import build_schedule
from himap_jax.engine import programs, sharding
from himap_jax.engine.prefill import prefill
from himap_jax.families import from_hf
from himap_jax.model.network import Model, Network, abstract_params

# `config.json` as published: what is absent has the default of its model type.
LLAVA = {
  "architectures": ["LlavaForConditionalGeneration"],
  "ignore_index": -100,
  "image_token_index": 32000,
  "model_type": "llava",
  "pad_token_id": 32001,
  "projector_hidden_act": "gelu",
  "tie_word_embeddings": False,
  "torch_dtype": "float16",
  "vision_config": {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
  },
  "vision_feature_layer": -2,
  "vision_feature_select_strategy": "default",
  "vocab_size": 32064,
}
VICUNA_7B = {
  "architectures": ["LlamaForCausalLM"],
  "max_position_embeddings": 4096,
  "model_type": "llama",
  "rms_norm_eps": 1e-05,
  "torch_dtype": "float16",
  "vocab_size": 32064,
}
VICUNA_13B = VICUNA_7B | {
  "hidden_size": 5120,
  "intermediate_size": 13824,
  "num_attention_heads": 40,
  "num_hidden_layers": 40,
  "num_key_value_heads": 40,
}
SIZES = {"7b": VICUNA_7B, "13b": VICUNA_13B}

# The features are those of the last layer but one, so the last layer and the norm after it are never computed.
UNUSED = re.compile(r"vision_tower\.(encoder\.layers\.23|post_layernorm)\.")


@pytest.fixture(scope="module", params=SIZES)
def published(request, tmp_path_factory):
  """The size's name, a directory with its config.json, our config of it, our parameters as shapes."""
  directory = tmp_path_factory.mktemp(request.param)
  fields = LLAVA | {"text_config": SIZES[request.param]}
  (directory / "config.json").write_text(json.dumps(fields))
  config = from_hf(fields)
  return request.param, directory, config, abstract_params(config, jnp.bfloat16)


def test_parameters(published):
  size, directory, _, params = published
  with torch.device("meta"):
    model = transformers.LlavaForConditionalGeneration(transformers.AutoConfig.from_pretrained(directory))
  theirs = {name.removeprefix("model."): tuple(p.shape) for name, p in model.named_parameters()}
  used = {name: shape for name, shape in theirs.items() if not UNUSED.match(name)}
  assert len(theirs) - len(used) == 18

  ours = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    assert leaf.dtype == jnp.bfloat16
    ours[re.sub(r"layers_(\d+)", r"layers.\1", ".".join(key.key for key in path))] = leaf.shape
  assert ours == used
  assert count(theirs) == {"7b": 7_063_427_072, "13b": 13_351_494_656}[size]
  assert count(theirs) - count(ours) == 12_596_224 + 2_048  # one layer of the tower, one layer norm


@pytest.mark.parametrize("method", ["none", "himap"])
def test_cache_bytes(published, method):
  batch, text = 4, 64
  _, _, config, params = published
  layers = config.text.num_hidden_layers
  schedule = build_schedule(method, num_layers=layers, num_image_tokens=576)
  inputs, _ = programs.abstract_inputs(
    config, sharding.make_mesh(), batch_size=batch, num_text_slots=text, image_shape=(336, 336)
  )
  model = Model(params, Network(config, jnp.bfloat16))
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
  result = jax.eval_shape(lambda model, *arguments: prefill(model.bind(), *arguments, schedule), model, inputs, keys)

  # layers that hold 576, 288 and 72 image tokens; a slot is a key and a value, each as wide as the model, in two bytes
  segments = {"none": [(layers, 576)], "himap": [(2, 576), (6, 288), (layers - 8, 72)]}[method]
  keys_and_values = sum(
    count * batch * (text + image_tokens) * 2 * config.text.hidden_size * 2 for count, image_tokens in segments
  )
  order = sum(batch * (text + image_tokens) * 4 for _, image_tokens in segments)
  assert num_bytes([(cache.keys, cache.values) for cache in result.caches]) == keys_and_values
  assert num_bytes([cache.order for cache in result.caches]) == order
  assert num_bytes(result.caches) == keys_and_values + order
  assert result.logits.shape == (batch, 32064)
  assert result.logits.dtype == jnp.float32
  assert [stage.shape for stage in result.kept] == [(batch, kept) for _, kept in segments[1:]]


def num_bytes(tree):
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def count(shapes):
  return sum(torch.Size(shape).numel() for shape in shapes.values())


@pytest.mark.parametrize(
  ("name", "tower", "connector", "decoder"),
  [
    ("internvl_7b", 5.534, 0.030, 6.739),
    ("qwen_vl_7b", 1.843, 0.093, 7.721),
    ("mllama_11b", 0.864, 0.031, 9.775),
    ("internvl3_1b", 0.304, 0.004, 0.630),
    ("gemma3_4b", 0.417, 0.003, 3.880),
    ("smolvlm_256m", 0.086, 0.007, 0.163),
  ],
)
def test_other_models_have_their_published_sizes(name, tower, connector, decoder):
  """In billions: InternViT-6B without its last three layers and Vicuna-7B; Qwen-VL-Chat, of 9.6 in all;
  Llama-3.2-11B-Vision, of 10.67."""
  params = abstract_params(geometries.model_of(name), jnp.bfloat16)
  count = {part: sum(math.prod(x.shape) for x in jax.tree.leaves(tree)) / 1e9 for part, tree in params.items()}
  assert count["vision_tower"] == pytest.approx(tower, abs=1e-3)
  assert count["multi_modal_projector"] == pytest.approx(connector, abs=1e-3)
  assert count["language_model"] + count.get("lm_head", 0) == pytest.approx(decoder, abs=1e-3)
