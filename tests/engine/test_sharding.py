"""Meshes of eight simulated devices: each holds its part, and they exchange no more than the model needs."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_himap
from jax.sharding import PartitionSpec

from experiments.shared.compiler_report import collectives
from himap_jax import build_schedule, checkpoint
from himap_jax.engine import programs, sharding
from himap_jax.engine.decoding import DecodeConfig
from himap_jax.families import from_hf
from himap_jax.model.network import Model, Network, abstract_params, logical_axes
from himap_jax.pruning.methods import METHODS


class TestParameters:
  def test_every_device_reads_its_part(self, checkpoints, tmp_path):
    name = "clip_gqa_tied"  # four heads, two key heads
    opened = checkpoint.open_checkpoint(str(checkpoints(name).directory), cache_dir=tmp_path)
    whole = opened.restore(dtype=jnp.float32)
    parts = opened.restore(dtype=jnp.float32, mesh=sharding.make_mesh(data=2, tensor=4))
    assert (whole.config.text.num_key_value_heads, parts.config.text.num_key_value_heads) == (2, 4)
    layer, expected = (loaded.model.params["language_model"]["layers_1"] for loaded in (parts, whole))
    for projection, axis in (("q_proj", 0), ("k_proj", 0), ("v_proj", 0), ("o_proj", 1)):
      weight = layer["self_attn"][projection]["weight"]
      assert weight.addressable_shards[0].data.shape[axis] == 12, projection
    for projection, shape in (("gate_proj", (24, 48)), ("down_proj", (48, 24))):
      assert layer["mlp"][projection]["weight"].addressable_shards[0].data.shape == shape
    embedding = parts.model.params["language_model"]["embed_tokens"]["weight"]
    assert embedding.addressable_shards[0].data.shape == (68, 48)
    for name in ("k_proj", "v_proj"):
      for kind in ("weight", "bias"):
        actual, original = (np.asarray(x["self_attn"][name][kind]) for x in (layer, expected))
        np.testing.assert_array_equal(actual, np.concatenate([original[h * 12 : h * 12 + 12] for h in (0, 0, 1, 1)]))

  def test_bytes_of_a_device(self, checkpoints, tmp_path):
    opened = checkpoint.open_checkpoint(str(checkpoints("clip_mha").directory), cache_dir=tmp_path)
    params = opened.restore(dtype=jnp.float32, mesh=sharding.make_mesh(data=2, tensor=4)).model.params
    decoder = {name: leaf for name, leaf in params["language_model"].items() if name.startswith("layers")}
    total = sum(x.nbytes for x in jax.tree.leaves(decoder))
    own = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(decoder))
    assert total / 4 <= own < 1.02 * total / 4  # norms are replicated
    assert opened.num_bytes(jnp.float32) == sum(x.nbytes for x in jax.tree.leaves(params))
    assert opened.num_bytes(jnp.bfloat16) == opened.num_bytes(jnp.float32) / 2
    eight = opened.restore(dtype=jnp.float32, int8_weights=True).model.params
    assert opened.num_bytes(jnp.float32, int8_weights=True) == sum(x.nbytes for x in jax.tree.leaves(eight))


TEXT = dict(
  model_type="llama",
  vocab_size=256,
  hidden_size=64,
  intermediate_size=128,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=2,
  rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
)
CONFIG = from_hf(
  {
    "model_type": "llava",
    "image_token_index": 3,
    "vision_config": {
      "model_type": "clip_vision_model",
      "hidden_size": 32,
      "intermediate_size": 64,
      "num_hidden_layers": 3,
      "num_attention_heads": 4,
      "patch_size": 7,
      "image_size": 28,
    },
    "text_config": TEXT,
  }
)
BATCH, TEXT_SLOTS, NUM_IMAGE_TOKENS = 8, 24, 16


@functools.cache
def exchanged(program, method, sizes):
  """The collectives of one of the programs of CONFIG on a mesh, compiled from shapes alone."""
  mesh = sharding.make_mesh(*sizes)
  config = sharding.with_divisible_key_heads(CONFIG, mesh)
  own = {"none": {}, "shortv": dict(prune_layers=(1, 2)), "fitprune": {}, "dart": dict(prune_layers=(2,), keep=(8,))}
  before = dict(prune_layers=(0,), keep=(8,)) if METHODS[method].acts == "before" else None
  settings = own.get(method, before or dict(prune_layers=(1, 2), keep=(8, 3)))
  schedule = build_schedule(method, num_layers=TEXT["num_hidden_layers"], num_image_tokens=NUM_IMAGE_TOKENS, **settings)
  params = sharding.placed(abstract_params(config, jnp.float32), logical_axes(config), config, mesh)
  model = Model(params, Network(config, jnp.float32, sharding.kernels_for(mesh)))
  inputs = programs.abstract_inputs(config, mesh, batch_size=BATCH, num_text_slots=TEXT_SLOTS, image_shape=(28, 28))
  parameters = programs.method_parameters(schedule)
  own = programs.Programs(model, schedule, DecodeConfig(4))
  if program == "prefill":
    return collectives(own.prefill.lower(model, *inputs, parameters).compile())
  return collectives(getattr(own.lower(*inputs, parameters, num_slots=BATCH), program).compile())


class TestCollectives:
  @pytest.mark.sampled
  @pytest.mark.parametrize("method", [name for name in METHODS if name not in reference_himap.ABLATIONS])
  def test_rows_need_none(self, method):
    assert exchanged("prefill", method, (8, 1)) == []

  @pytest.mark.sampled
  @pytest.mark.parametrize("method", ["none", "himap", "himap_adaptive"])
  def test_decoding_rows_needs_none(self, method):
    assert exchanged("decode", method, (8, 1)) == []

  @pytest.mark.sampled
  @pytest.mark.parametrize("sizes", [(8, 1), (4, 2)])
  def test_rows_enter_slots_of_their_device(self, sizes):
    assert exchanged("enter", "himap", sizes) == []

  def test_a_layer_adds_up_twice(self):
    everywhere = exchanged("prefill", "none", (4, 2))
    hidden = BATCH // 4 * (TEXT_SLOTS + NUM_IMAGE_TOKENS) * TEXT["hidden_size"] * 4
    for layer in range(TEXT["num_hidden_layers"]):
      found = [one for one in everywhere if f"/layer_{layer}/" in one.scope]
      assert [(one.kind, one.num_bytes) for one in found] == [("all-reduce", hidden)] * 2

  def test_a_stage_adds_at_most_the_heads_average(self):
    plain, pruned = (exchanged("prefill", method, (4, 2)) for method in ("none", "himap"))
    stages = [one for one in pruned if "/prune_before_layer_" in one.scope]
    slots = TEXT_SLOTS + NUM_IMAGE_TOKENS
    assert len(stages) <= 2 and all(one.kind == "all-reduce" for one in stages)
    assert sum(one.num_bytes for one in stages) <= BATCH // 4 * (slots + slots - 8) * 4
    assert len(pruned) - len(stages) == len(plain)
    assert sum(one.num_bytes for one in pruned) < sum(one.num_bytes for one in plain)

  def test_decoding_adds_up_twice_a_layer(self):
    for method in ("none", "himap"):
      found = [one for one in exchanged("decode", method, (4, 2)) if "layers_" in one.scope]
      assert len(found) == 2 * TEXT["num_hidden_layers"] and {one.kind for one in found} == {"all-reduce"}
      assert {one.num_bytes for one in found} == {BATCH // 4 * TEXT["hidden_size"] * 4}


class TestMesh:
  def test_too_few_devices(self):
    with pytest.raises(ValueError, match="needs 16 devices, but there are 8"):
      sharding.make_mesh(8, 2)

  @pytest.mark.parametrize(("batch_size", "data"), [(1, 1), (2, 2), (6, 6), (7, 7), (8, 8), (9, 3), (11, 1), (16, 8)])
  def test_chosen_without_a_limit_of_memory(self, batch_size, data):
    assert sharding.choose_mesh(CONFIG, 10**12, batch_size) == {"data": data, "tensor": 1}

  @pytest.mark.parametrize(("gigabytes", "tensor"), [(5, 1), (14, 2), (27, 4), (500, 4)])
  def test_chosen_for_devices_of_16_gigabytes(self, monkeypatch, gigabytes, tensor):
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 16e9})
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert sharding.choose_mesh(CONFIG, int(gigabytes * 1e9), 8) == {"data": 8 // tensor, "tensor": tensor}

  def test_what_is_replicated_is_said(self):
    assert "2 copies of every key head" in sharding.describe(CONFIG, sharding.make_mesh(2, 4))
    odd = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, vocab_size=257))
    text = sharding.describe(odd, sharding.make_mesh(4, 2))
    assert text.startswith("data:4,tensor:2 of cpu devices") and text.endswith("replicated: vocabulary")
    assert sharding.rules(odd, sharding.make_mesh(4, 2))["vocabulary"] is None

  def test_heads_that_are_not_divided_stay_whole(self):
    mesh = sharding.make_mesh(2, 3)
    assert sharding.with_divisible_key_heads(CONFIG, mesh) == CONFIG
    rules = sharding.rules(CONFIG, mesh)
    assert (rules["heads"], rules["key_heads"], rules["batch"]) == (None, None, "data")
    assert sharding.heads(mesh, 4, 2) == PartitionSpec("data", None)
