"""The parts of the demo checkpoint on tiny inputs: language model, adapter and cross-attention layers."""

import subprocess
import sys
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoints_convert.demo import assemble, cross, smollm2


@pytest.fixture
def rng():
  return np.random.default_rng(0)


# Language model


def _permute(weight, heads):
  """GGUF's row order, row by row."""
  size = len(weight) // heads
  rows = []
  for head in range(heads):
    for i in range(size // 2):
      rows.append(weight[head * size + i])
      rows.append(weight[head * size + size // 2 + i])
  return np.stack(rows)


@pytest.mark.parametrize("heads", [1, 3])
def test_unpermute(rng, heads):
  weight = rng.normal(size=(heads * 8, 5)).astype(np.float32)
  np.testing.assert_array_equal(smollm2.unpermute(_permute(weight, heads), heads), weight)


def test_gguf_weights_and_config(tmp_path):
  import torch
  import transformers

  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=64,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    rope_parameters={"rope_type": "default", "rope_theta": 5e4},
  )
  expected = {name: value.numpy() for name, value in transformers.LlamaModel(config).state_dict().items()}
  writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
  writer.add_embedding_length(32)
  writer.add_feed_forward_length(64)
  writer.add_block_count(2)
  writer.add_head_count(4)
  writer.add_head_count_kv(2)
  writer.add_vocab_size(64)
  writer.add_context_length(128)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_rope_freq_base(5e4)
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(2)
  writer.add_pad_token_id(2)
  names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
  for name, value in expected.items():
    if "q_proj" in name:
      value = _permute(value, 4)
    if "k_proj" in name:
      value = _permute(value, 2)
    writer.add_tensor(names.get_name("model." + name, try_suffixes=(".weight",)), value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()

  reader = smollm2.read(tmp_path / "tiny.gguf")
  found = smollm2.weights(reader)
  assert found.keys() == expected.keys()
  for name in expected:
    np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
  read = transformers.LlamaConfig(**smollm2.config(reader))
  for name in (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
  ):
    assert getattr(read, name) == getattr(config, name), name


# Adapter


@pytest.fixture
def language_model(rng):
  return {
    "layers.0.self_attn.q_proj.weight": rng.normal(size=(6, 6)).astype(np.float32),
    "layers.0.mlp.up_proj.weight": rng.normal(size=(9, 6)).astype(np.float32),
    "layers.0.input_layernorm.weight": np.ones(6, np.float32),
    "embed_tokens.weight": rng.normal(size=(11, 6)).astype(np.float32),
  }


@pytest.fixture
def adapter_tensors(rng):
  shapes = {
    "multi_modal_projector.linear_1.weight": (6, 4),
    "multi_modal_projector.linear_1.bias": (6,),
    "multi_modal_projector.linear_2.weight": (6, 6),
    "multi_modal_projector.linear_2.bias": (6,),
    "language_model.layers.0.mlp.up_proj.lora_a": (2, 6),
    "language_model.layers.0.mlp.up_proj.lora_b": (9, 2),
  }
  return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_the_merged_weights_are_the_same_on_every_processor(rng):
  """Sums are taken one after another in float64, as Python's are, and rounded once."""
  b, a = (rng.normal(size=shape).astype(np.float32) for shape in ((6, 16), (16, 9)))
  expected = [
    [np.float32(sum(float(x) * float(y) for x, y in zip(row, column, strict=True))) for column in a.T] for row in b
  ]
  language_model = {
    "embed_tokens.weight": np.zeros((3, 6), np.float32),
    "layers.0.up_proj.weight": np.zeros((6, 9), np.float32),
  }
  tensors = {"language_model.layers.0.up_proj.lora_b": b, "language_model.layers.0.up_proj.lora_a": a}
  tensors |= {f"multi_modal_projector.{name}.weight": np.zeros((6, 6), np.float32) for name in ("linear_1", "linear_2")}
  tensors |= {f"multi_modal_projector.{name}.bias": np.zeros(6, np.float32) for name in ("linear_1", "linear_2")}
  merged, _ = assemble.merge_adapter(language_model, tensors, 1.0, num_features=6)
  np.testing.assert_array_equal(merged["layers.0.up_proj.weight"], expected)


def test_merge_adapter(language_model, adapter_tensors):
  before = {name: value.copy() for name, value in language_model.items()}
  merged, projector = assemble.merge_adapter(language_model, adapter_tensors, 2.0, num_features=4)
  a = adapter_tensors["language_model.layers.0.mlp.up_proj.lora_a"]
  b = adapter_tensors["language_model.layers.0.mlp.up_proj.lora_b"]
  expected = before["layers.0.mlp.up_proj.weight"].astype(np.float64)
  for row in range(9):
    for column in range(6):
      expected[row, column] += 2.0 * sum(float(b[row, r]) * float(a[r, column]) for r in range(2))
  np.testing.assert_allclose(merged["layers.0.mlp.up_proj.weight"], expected, rtol=1e-5, atol=1e-6)
  assert merged["layers.0.mlp.up_proj.weight"].dtype == np.float32
  for name, value in before.items():
    np.testing.assert_array_equal(language_model[name], value)
    if name != "layers.0.mlp.up_proj.weight":
      np.testing.assert_array_equal(merged[name], value)
  assert projector.keys() == {"linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"}
  for name, value in projector.items():
    np.testing.assert_array_equal(value, adapter_tensors[f"multi_modal_projector.{name}"])


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"multi_modal_projector.linear_2.bias": None}, "missing multi_modal_projector.linear_2.bias"),
    ({"multi_modal_projector.linear_3.bias": (6,)}, "unknown multi_modal_projector.linear_3.bias"),
    ({"multi_modal_projector.linear_1.weight": (4, 6)}, r"linear_1.weight is \[4, 6\], not \[6, 4\]"),
    ({"vision_tower.layernorm.weight": (4,)}, "unknown vision_tower.layernorm.weight"),
    ({"language_model.layers.7.mlp.up_proj.lora_a": (2, 6)}, "unknown language_model.layers.7.mlp.up_proj.lora_a"),
    ({"language_model.layers.0.input_layernorm.lora_a": (2, 6)}, "unknown language_model.layers.0.input_layernorm"),
    ({"language_model.layers.0.mlp.up_proj.lora_a": None}, "up_proj.lora_b without its partner"),
    ({"language_model.layers.0.mlp.up_proj.lora_b": None}, "up_proj.lora_a without its partner"),
    ({"language_model.layers.0.mlp.up_proj.lora_a": (3, 6)}, r"do not make \[9, 6\]"),
    ({"language_model.layers.0.mlp.up_proj.lora_b": (6, 2)}, r"do not make \[9, 6\]"),
    ({"language_model.layers.0.mlp.up_proj.lora_b": (9,)}, r"do not make \[9, 6\]"),
  ],
)
def test_adapter_that_does_not_fit(language_model, adapter_tensors, change, message):
  for name, shape in change.items():
    if shape is None:
      del adapter_tensors[name]
    else:
      adapter_tensors[name] = np.zeros(shape, np.float32)
  with pytest.raises(ValueError, match=message):
    assemble.merge_adapter(language_model, adapter_tensors, 2.0, num_features=4)


def test_adapter_with_nan(language_model, adapter_tensors):
  adapter_tensors["multi_modal_projector.linear_1.bias"][0] = np.nan
  with pytest.raises(ValueError, match="not finite"):
    assemble.merge_adapter(language_model, adapter_tensors, 2.0, num_features=4)


def test_read_adapter(tmp_path, adapter_tensors):
  path = tmp_path / "adapter.safetensors"
  stored = {name: value.astype(ml_dtypes.bfloat16) for name, value in adapter_tensors.items()}
  save_file(stored, path, metadata={"lora_scale": "2.0"})
  tensors, scale = assemble.read_adapter(path)
  assert scale == 2.0 and tensors.keys() == stored.keys()
  for name, value in tensors.items():
    assert value.dtype == np.float32
    np.testing.assert_array_equal(value, stored[name].astype(np.float32))


def test_bfloat16_adapter_in_a_fresh_process(tmp_path):
  path = tmp_path / "adapter.safetensors"
  save_file({"a": np.ones(2, ml_dtypes.bfloat16)}, path, metadata={"lora_scale": "1"})
  code = f"from checkpoints_convert.demo.assemble import read_adapter; print(read_adapter({str(path)!r}))"
  subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("metadata", [None, {"lora_scale": "much"}])
def test_adapter_without_scale(tmp_path, metadata):
  save_file({"a": np.zeros(1, np.float32)}, tmp_path / "adapter.safetensors", metadata=metadata)
  with pytest.raises(ValueError, match="lora_scale"):
    assemble.read_adapter(tmp_path / "adapter.safetensors")


def test_truncated_adapter(tmp_path):
  path = tmp_path / "adapter.safetensors"
  save_file({"a": np.zeros(99, np.float32)}, path, metadata={"lora_scale": "1"})
  path.write_bytes(path.read_bytes()[:-8])
  with pytest.raises(ValueError, match="not a readable safetensors file"):
    assemble.read_adapter(path)


@pytest.mark.parametrize("shape", [(6,), (7,), None])
def test_tensors_that_are_trained_whole(language_model, adapter_tensors, shape):
  name = "layers.0.input_layernorm.weight"
  if shape is not None:
    adapter_tensors[f"language_model.{name}"] = np.full(shape, 3, np.float32)
  merge = lambda: assemble.merge_adapter(language_model, adapter_tensors, 2.0, num_features=4, trained=[name])  # noqa: E731
  if shape == (6,):
    np.testing.assert_array_equal(merge()[0][name], [3] * 6)
    assert (language_model[name] == 1).all()
  else:
    with pytest.raises(ValueError, match=f"{name} is .7., not .6." if shape else f"missing language_model.{name}"):
      merge()


# Cross-attention layers


@pytest.fixture(scope="module")
def inserted():
  """A random decoder of transformers, and the one with cross-attention layers that is made of it."""
  import torch
  import transformers
  from tiny_checkpoints import LLAMA, randomize

  config = transformers.LlamaConfig(**LLAMA, head_dim=12, bos_token_id=0, eos_token_id=1, pad_token_id=2)
  llama = transformers.LlamaForCausalLM(config).eval()
  randomize(llama, seed=0)
  tensors = {name: value.numpy() for name, value in llama.model.state_dict().items()}
  tensors, fields = cross.insert(tensors, config.to_dict())
  config = transformers.MllamaTextConfig(**{key: value for key, value in fields.items() if key != "model_type"})
  config._attn_implementation = "eager"
  model = transformers.models.mllama.modeling_mllama.MllamaTextModel(config).eval()
  extra = model.state_dict()["embed_tokens.weight"][config.vocab_size :]
  tensors["embed_tokens.weight"] = np.concatenate([tensors["embed_tokens.weight"], extra.numpy()])
  model.load_state_dict({name: torch.tensor(value) for name, value in tensors.items()})
  return llama, model, fields


def test_closed_gates_leave_the_decoder_as_it_was(inserted):
  import torch

  llama, model, fields = inserted
  assert fields["num_hidden_layers"] == 8 and fields["cross_attention_layers"] == [1, 5]
  states = torch.randn(1, 7, 48, generator=torch.Generator().manual_seed(0))
  ids = torch.arange(10)[None] + 20
  with torch.no_grad():
    expected = llama.model(ids).last_hidden_state
    opened = model(ids, cross_attention_states=states).last_hidden_state
    for name, parameter in model.named_parameters():
      if "gate" in name and parameter.shape == (1,):
        assert parameter.item() == np.float32(0.5 if "attn_gate" in name else 0.1)
        parameter.zero_()
    closed = model(ids, cross_attention_states=states).last_hidden_state
  torch.testing.assert_close(closed, expected, atol=1e-5, rtol=0)
  assert (opened - expected).abs().max() > 0.1


def test_image_tokens_are_read_as_words_are(inserted):
  """The values of a cross-attention layer are those that the layer after it makes of embeddings of the usual size."""
  import torch

  llama, model, _ = inserted
  table = llama.model.embed_tokens.weight
  words = table[20:40] * (table.square().mean() / table[20:40].square().mean(dim=1, keepdim=True)).sqrt()
  own, source = model.layers[5], llama.model.layers[4]
  with torch.no_grad():
    expected = source.self_attn.v_proj(source.input_layernorm(words))
    torch.testing.assert_close(own.cross_attn.v_proj(words), expected, atol=1e-4, rtol=1e-4)
