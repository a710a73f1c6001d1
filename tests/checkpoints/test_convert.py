"""Conversion of every layout to one tree, and the refusal of what is not whole, by the conversion and by direct loading."""

import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time

import commands
import huggingface_hub
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import transformers
from flax import traverse_util
from layouts import (
  WEIGHTS,
  assert_same_trees,
  convert_to,
  copy_of,
  flat_params,
  make_original,
  newer_name,
  older_name,
  refuses,
  shard,
  tree_path,
)
from peak_memory import WATCHED, widen
from safetensors.numpy import load_file, save_file

from checkpoints_convert import source, store
from checkpoints_convert.json_files import read_json
from himap_jax import checkpoint
from himap_jax.engine import sharding
from himap_jax.families import from_hf
from himap_jax.model.network import abstract_params

pytestmark = pytest.mark.usefixtures("cache")
ROOT = pathlib.Path(__file__).parents[2]


def read_config(directory):
  return from_hf(read_json(directory / "config.json"))


@pytest.fixture(scope="module")
def clip(checkpoints):
  return checkpoints("clip_mha").directory


@pytest.fixture(scope="module")
def expected(clip, cache, tmp_path_factory):
  return flat_params(convert_to(clip, tmp_path_factory.mktemp("expected") / "converted"))


class TestLayouts:
  def test_parameters_are_the_tensors_of_the_checkpoint(self, clip, expected):
    tensors = {tree_path(name): value for name, value in load_file(clip / WEIGHTS).items()}
    config = read_config(clip)
    shapes = traverse_util.flatten_dict(abstract_params(config, jnp.float32), sep="/")
    assert expected.keys() == shapes.keys()
    for path, leaf in expected.items():
      np.testing.assert_array_equal(np.asarray(leaf), tensors[path])

  @pytest.mark.sampled
  @pytest.mark.parametrize("rename", [older_name, newer_name, lambda name: newer_name(older_name(name))])
  @pytest.mark.parametrize("sharded", [False, True])
  def test_hugging_face_names(self, clip, expected, tmp_path, rename, sharded):
    directory = copy_of(clip, tmp_path / "source", rename=rename)
    if sharded:
      shard(directory)
    assert_same_trees(flat_params(convert_to(directory, tmp_path / "target")), expected)

  def test_shards_written_by_transformers(self, checkpoints, expected, tmp_path):
    tiny = checkpoints("clip_mha")
    tiny.model.save_pretrained(tmp_path / "source", max_shard_size="100KB")
    tiny.processor.save_pretrained(tmp_path / "source")
    assert len(list((tmp_path / "source").glob("model-*.safetensors"))) > 2
    assert_same_trees(flat_params(convert_to(tmp_path / "source", tmp_path / "target")), expected)

  @pytest.mark.parametrize("tower_inside", [False, True])
  def test_original_layout(self, clip, expected, tmp_path, images, tower_inside):
    directory = make_original(clip, tmp_path / "source", tower_inside=tower_inside)
    target = convert_to(directory, tmp_path / "target")
    assert_same_trees(flat_params(target), expected)
    reference, config = read_config(clip), read_config(target)
    assert (config.text, config.vision) == (reference.text, reference.vision)
    assert config.vision.feature_layers == reference.vision.feature_layers
    processor = checkpoint.load(str(target), dtype=jnp.float32).processor
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == config.image_token_id
    wide = processor(images=images[1], text="<image>\nhello", return_tensors="np")
    assert wide["pixel_values"].shape == (1, 3, 28, 28)
    assert (wide["input_ids"] == config.image_token_id).sum() == 16
    assert np.abs(wide["pixel_values"][0, :, 0]).max() < 0.02  # the padding above a wide image has the mean colour
    prompt = processor.apply_chat_template(
      [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}], add_generation_prompt=True
    )
    assert prompt == "USER: <image>\nWhat? ASSISTANT:"

  def test_original_layout_with_named_tower(self, clip, expected, tmp_path):
    directory = make_original(clip, tmp_path / "source", tower_inside=False)
    shutil.move(directory / "clip", tmp_path / "elsewhere")
    refuses(directory, tmp_path / "target", "--vision_tower")
    target = convert_to(directory, tmp_path / "target", vision_tower=str(tmp_path / "elsewhere"))
    assert_same_trees(flat_params(target), expected)

  @pytest.mark.sampled
  @pytest.mark.parametrize("name", ["clip_gqa_tied", "siglip", "dinov2"])
  def test_other_towers_and_tied_heads(self, checkpoints, tmp_path, name):
    directory = checkpoints(name).directory
    newer = copy_of(directory, tmp_path / "newer", rename=newer_name)
    assert_same_trees(
      flat_params(convert_to(directory, tmp_path / "a")), flat_params(convert_to(newer, tmp_path / "b"))
    )

  def test_unneeded_tensors_are_left_out(self, checkpoints, tmp_path, capsys):
    directory = copy_of(
      checkpoints("siglip").directory,
      tmp_path / "source",
      change=lambda tensors: (
        tensors
        | {
          "language_model.lm_head.weight": np.zeros((272, 48), np.float32),
          "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(6, np.float32),
          "vision_tower.vision_model.embeddings.position_ids": np.zeros((1, 25), np.int64),
        }
      ),
    )
    convert_to(directory, tmp_path / "target")
    assert "lm_head" not in str(flat_params(tmp_path / "target").keys())
    assert "not used by the model" in capsys.readouterr().err

  def test_further_chat_templates_are_copied(self, clip, tmp_path):
    source = copy_of(clip, tmp_path / "source")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "short.jinja").write_text("{{ messages }}")
    convert_to(source, tmp_path / "target")
    assert (tmp_path / "target/additional_chat_templates/short.jinja").read_text() == "{{ messages }}"

  def test_config_of_the_target_is_complete(self, clip, tmp_path):
    target = convert_to(clip, tmp_path / "target")
    assert read_config(target) == read_config(clip)
    assert "rms_norm_eps" in json.loads((target / "config.json").read_text())["text_config"]
    copied = {path.name for path in clip.iterdir()} - {WEIGHTS}
    assert {path.name for path in target.iterdir()} == copied | {"himap_jax.json", "params"}


class TestDtypesAndShardings:
  @pytest.mark.sampled
  @pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
  def test_stored_dtype_is_kept_and_cast_on_loading(self, clip, expected, tmp_path, dtype):
    def cast(tensors):
      return {name: value.astype(dtype) for name, value in tensors.items()}

    target = convert_to(copy_of(clip, tmp_path / "source", change=cast), tmp_path / "target")
    assert json.loads((target / "himap_jax.json").read_text())["dtypes"] == [np.dtype(dtype).name]
    loaded = flat_params(target, jnp.float32)
    assert_same_trees(loaded, {path: leaf.astype(dtype).astype(jnp.float32) for path, leaf in expected.items()})

  def test_float32_to_bfloat16(self, clip, expected, tmp_path):
    loaded = flat_params(convert_to(clip, tmp_path / "target"), jnp.bfloat16)
    assert {leaf.dtype for leaf in loaded.values()} == {jnp.bfloat16.dtype}
    assert_same_trees(loaded, {path: leaf.astype(jnp.bfloat16) for path, leaf in expected.items()})

  def test_restores_into_shardings(self, clip, expected, tmp_path):
    target = convert_to(clip, tmp_path / "target")
    loaded = flat_params(target, mesh=sharding.make_mesh(data=2, tensor=4))
    head, down = loaded["lm_head/weight"], loaded["language_model/layers_0/mlp/down_proj/weight"]
    assert head.addressable_shards[0].data.shape == (68, 48) and down.addressable_shards[0].data.shape == (48, 24)
    assert_same_trees(loaded, expected)


def converted(directory, cache):
  return checkpoint.open_checkpoint(str(directory), cache_dir=cache).directory


def halve(path, name):
  """Changes one tensor of a file and leaves the file's size."""
  tensors = load_file(path)
  tensors[name] = tensors[name] / 2
  save_file(tensors, path)


def change_json(path, **fields):
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def drop(tensors, *dropped):
  return {name: value for name, value in tensors.items() if name not in dropped}


class TestRefusals:
  def test_names_and_shapes_in_one_message(self, clip, tmp_path):
    directory = copy_of(
      clip,
      tmp_path / "source",
      change=lambda tensors: (
        drop(tensors, "language_model.model.norm.weight")
        | {
          "language_model.model.layers.1.mlp.up_proj.weight": np.zeros((96, 47), np.float32),
          "language_model.model.layers.2.mlp.up_proj.bias": np.zeros(96, np.float32),
          "multi_modal_projector.linear_1.bias": np.zeros(48, np.int32),
        }
      ),
    )
    message = refuses(directory, tmp_path / "target", "the weights are not those of the model")
    assert "1 missing (language_model.norm.weight)" in message
    assert "1 unexpected (language_model.model.layers.2.mlp.up_proj.bias)" in message
    assert "up_proj.weight is [96, 47], expected [96, 48]" in message
    assert "linear_1.bias is I32" in message
    assert list(tmp_path.iterdir()) == [directory]

  def test_only_the_first_of_many_are_named(self, clip, tmp_path):
    directory = copy_of(
      clip,
      tmp_path / "source",
      change=lambda tensors: {name: value for name, value in tensors.items() if "q_proj" not in name},
    )
    refuses(directory, tmp_path / "target", r"10 missing \(.*, …\)")

  def test_a_tensor_under_two_names(self, clip, tmp_path):
    directory = copy_of(
      clip,
      tmp_path / "source",
      change=lambda tensors: tensors | {"lm_head.weight": tensors["language_model.lm_head.weight"]},
    )
    refuses(directory, tmp_path / "target", "1 stored twice")

  def test_missing_shard(self, clip, tmp_path):
    directory = shard(copy_of(clip, tmp_path / "source"))
    (directory / "model-00002-of-00003.safetensors").unlink()
    refuses(directory, tmp_path / "target", r"1 of 3 shards are missing \(model-00002-of-00003")

  def test_shard_without_its_tensors(self, clip, tmp_path):
    directory = shard(copy_of(clip, tmp_path / "source"))
    shutil.copy(directory / "model-00001-of-00003.safetensors", directory / "model-00002-of-00003.safetensors")
    refuses(directory, tmp_path / "target", "is also in|not in the shard")

  @pytest.mark.parametrize(
    "size, reason", [(0, "no header"), (5, "no header"), (300, "inside its header"), (-1, "truncated")]
  )
  def test_truncated(self, clip, tmp_path, size, reason):
    directory = copy_of(clip, tmp_path / "source")
    whole = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(whole[:size])
    refuses(directory, tmp_path / "target", reason)

  @pytest.mark.parametrize(
    "content, reason",
    [
      (b"\x10\0\0\0\0\0\0\0not a json header", "unreadable header"),
      (b"\x02\0\0\0\0\0\0\0[]", "unreadable header"),
      (b"\xff" * 64, "no header"),
      (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ],
  )
  def test_corrupt_header(self, clip, tmp_path, content, reason):
    directory = copy_of(clip, tmp_path / "source")
    (directory / WEIGHTS).write_bytes(content)
    refuses(directory, tmp_path / "target", reason)

  @pytest.mark.parametrize(
    "entry",
    [
      {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
      {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]},
      {"dtype": "F32", "shape": [1]},
    ],
  )
  def test_corrupt_entry(self, clip, tmp_path, entry):
    directory = copy_of(clip, tmp_path / "source")
    header = json.dumps({"x": entry}).encode()
    (directory / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    refuses(directory, tmp_path / "target", "unreadable header")

  @pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": "../x.safetensors"}}'])
  def test_corrupt_index(self, clip, tmp_path, index):
    directory = copy_of(clip, tmp_path / "source")
    (directory / "model.safetensors.index.json").write_text(index)
    refuses(directory, tmp_path / "target", "not an index")

  @pytest.mark.parametrize(
    "fields, reason",
    [
      ({"model_type": "paligemma"}, "model_type is 'paligemma'"),
      ({"text_config": {"model_type": "mamba"}}, "'mamba' is not supported; supported: llama, mistral, qwen2"),
      ({"vision_feature_layer": 0}, "names no layer of the tower"),
      ({"vision_feature_layer": []}, "names no layer of the tower"),
      ({"vision_feature_select_strategy": "cls"}, "config.json: transformers cannot read it"),
      ({"text_config": {"model_type": "llama", "hidden_size": "4096"}}, "config.json: hidden_size is '4096'; needed"),
      ({"projector_hidden_act": "gelu_fast"}, "activation 'gelu_fast' is not supported"),
    ],
  )
  def test_unknown_model(self, clip, tmp_path, fields, reason):
    refuses(copy_of(clip, tmp_path / "source", fields=fields), tmp_path / "target", reason)

  @pytest.mark.parametrize(
    "fields, reason",
    [
      ({"mm_projector_type": "linear"}, "mm_projector_type"),
      ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio"),
      ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
      ({"model_type": "llava_mistral"}, "model_type"),
      ({"unfreeze_mm_vision_tower": True}, "vision tower was trained"),
    ],
  )
  def test_unknown_original(self, clip, tmp_path, fields, reason):
    directory = make_original(clip, tmp_path / "source", tower_inside=False)
    change_json(directory / "config.json", **fields)
    refuses(directory, tmp_path / "target", reason)

  @pytest.mark.parametrize("name", ["../tower", "clip/../../tower", "{outside}", "owner/tower", None])
  def test_a_tower_outside_of_the_original(self, clip, tmp_path, monkeypatch, name):
    """Neither by its path nor, from where it lies, by what would be an id of the hub."""
    directory = make_original(clip, tmp_path / "source", tower_inside=False)
    for outside in (tmp_path / "tower", tmp_path / "owner/tower"):
      shutil.copytree(directory / "clip", outside)
    monkeypatch.chdir(tmp_path)
    change_json(directory / "config.json", mm_vision_tower=name and name.format(outside=tmp_path / "tower"))
    refuses(
      directory, tmp_path / "target", "mm_vision_tower is .*; needed: a folder inside the checkpoint, or a Hugging"
    )

  @pytest.mark.parametrize(
    "file, fields, reason",
    [
      ("clip/config.json", {"vision_config": []}, r"clip/config.json: vision_config is \[\]; needed: an object"),
      ("clip/config.json", {"vision_config": {"patch_size": 0}}, "patch_size is 0; needed: a whole number from 1"),
      ("clip/preprocessor_config.json", {"size": []}, "clip: cannot use its image processor"),
      ("tokenizer_config.json", {"tokenizer_class": 3}, "cannot read the tokenizer"),
      ("tokenizer_config.json", {"model_max_length": {}}, "cannot use the tokenizer"),
    ],
  )
  def test_damaged_original(self, clip, tmp_path, file, fields, reason):
    directory = make_original(clip, tmp_path / "source", tower_inside=False)
    change_json(directory / file, **fields)
    refuses(directory, tmp_path / "target", reason)

  @pytest.mark.parametrize("name", [None, "LlamaModel"])
  def test_a_tokenizer_class_that_is_none(self, clip, expected, tmp_path, name):
    directory = make_original(clip, tmp_path / "source", tower_inside=False)
    change_json(directory / "tokenizer_config.json", tokenizer_class=name)
    assert_same_trees(flat_params(convert_to(directory, tmp_path / "target")), expected)

  def test_neither_language_model_nor_generation_config(self, clip, tmp_path):
    directory = copy_of(clip, tmp_path / "source", fields={"text_config": None})
    (directory / "generation_config.json").unlink()
    refuses(directory, tmp_path / "target", "the weights are not those of the model")

  def test_no_such_checkpoint(self, tmp_path):
    for name in (str(tmp_path / "absent"), "a/b/c", "word", "~nobody/checkpoint"):
      with pytest.raises(ValueError, match="neither a directory nor a Hugging Face id"):
        source.locate(name)
    with pytest.raises(ValueError, match="cannot be downloaded"):
      source.locate("nobody/nothing")
    refuses(tmp_path, tmp_path / "target", "config.json: cannot be read")

  @pytest.mark.parametrize("error, reason", [(OSError(), "OSError"), (RuntimeError("403\nForbidden"), "403")])
  def test_a_hub_that_fails_in_its_own_way(self, monkeypatch, error, reason):
    def fail(*args, **kwargs):
      raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match=rf"hub \({reason}\); check the name"):
      source.locate("nobody/nothing")

  def test_target_in_the_way(self, clip, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="exists and was not converted"):
      convert_to(clip, tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"

  def test_target_that_orbax_would_take_for_a_pattern(self, clip, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="as a pattern"):
      convert_to(clip, tmp_path / "[1]")
    (tmp_path / "[2]").mkdir()
    monkeypatch.chdir(tmp_path / "[2]")
    with pytest.raises(ValueError, match="as a pattern"):
      convert_to(clip, "target")

  def test_damaged_target(self, clip, tmp_path):
    target = convert_to(clip, tmp_path / "target")
    shutil.rmtree(target / "params")
    with pytest.raises(ValueError, match="convert the checkpoint again"):
      flat_params(target)
    (target / "himap_jax.json").write_text('{"format": 0}')
    with pytest.raises(ValueError, match="converted in format 0"):
      flat_params(target)


class TestCache:
  """LLaVA's original layout is the one that is converted on the way."""

  def test_converted_once_and_again_when_the_weights_change(self, clip, tmp_path, monkeypatch):
    directory, cache = make_original(clip, tmp_path / "source", tower_inside=True), tmp_path / "cache"
    calls = []
    save = store.save_params
    monkeypatch.setattr(store, "save_params", lambda *args: (calls.append(1), save(*args)))
    first = converted(directory, cache)
    assert converted(directory, cache) == first and len(calls) == 1
    assert converted(first, cache) == first
    os.utime(directory / WEIGHTS, ns=(1, 1))
    assert converted(directory, cache) == first and len(calls) == 1
    halve(directory / WEIGHTS, "lm_head.weight")
    assert converted(directory, cache) != first and len(calls) == 2

  def test_converted_again_when_the_tower_of_an_original_layout_changes(self, clip, tmp_path):
    directory = make_original(clip, tmp_path / "source", tower_inside=False)
    first = converted(directory, tmp_path / "cache")
    assert converted(directory, tmp_path / "cache") == first
    halve(directory / "clip" / WEIGHTS, "vision_model.pre_layrnorm.weight")
    assert converted(directory, tmp_path / "cache") != first

  def test_a_filled_cache_may_be_read_only(self, clip, expected, tmp_path):
    directory, cache = make_original(clip, tmp_path / "source", tower_inside=True), tmp_path / "cache"
    first = converted(directory, cache)
    (cache / "converted").chmod(0o500)
    monkey = pytest.MonkeyPatch()
    monkey.setattr(store.filelock, "FileLock", lambda path: pytest.fail("locked"))
    try:
      assert converted(directory, cache) == first
    finally:
      monkey.undo()
      (cache / "converted").chmod(0o700)

  def test_concurrent_conversions_make_one(self, clip, tmp_path, monkeypatch):
    directory = make_original(clip, tmp_path / "source", tower_inside=True)
    calls, results = [], []
    save = store.save_params
    monkeypatch.setattr(store, "save_params", lambda *args: (calls.append(1), time.sleep(0.5), save(*args)))
    threads = [threading.Thread(target=lambda: results.append(converted(directory, tmp_path))) for _ in range(3)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    assert len(calls) == 1 and len(set(results)) == 1 and len(results) == 3
    assert [path.name for path in (tmp_path / "converted").iterdir()] == [results[0].name]

  def test_end_of_sequence_tokens(self, clip, tmp_path):
    for given, ids in ((1, (1,)), ([1, 5], (1, 5)), (None, (1,))):
      target = convert_to(clip, tmp_path / f"target{len(ids)}{given is None}")
      (target / "generation_config.json").write_text(json.dumps({"eos_token_id": given}))
      assert checkpoint.load(str(target), dtype=jnp.float32).eos_token_ids == ids

  @pytest.mark.parametrize("whole, text, ids", [(7, 5, (7,)), (None, [5, 6], (5, 6)), (None, None, (1,))])
  def test_end_of_sequence_tokens_of_config_json(self, clip, tmp_path, whole, text, ids):
    """Read directly and converted, as in transformers, or else the tokenizer's."""
    directory = copy_of(clip, tmp_path / "source", fields={"eos_token_id": whole})
    config = json.loads((directory / "config.json").read_text())
    change_json(directory / "config.json", text_config=config["text_config"] | {"eos_token_id": text})
    (directory / "generation_config.json").unlink()
    for path in (directory, convert_to(directory, tmp_path / "target")):
      assert checkpoint.open_checkpoint(str(path)).eos_token_ids == ids
    expected = transformers.LlavaForConditionalGeneration.from_pretrained(directory).generation_config.eos_token_id
    assert expected is None or np.atleast_1d(expected).tolist() == list(ids)


KILLED = """
import sys, time
from checkpoints_convert import store
from checkpoints_convert.convert import convert, open_source
from checkpoints_convert.stored import StoredTensor
from himap_jax.checkpoint import default_cache_dir, describe
reader = StoredTensor.reader
def slow(tensor):
    time.sleep(0.05)
    print("reading", flush=True)
    return reader(tensor)
StoredTensor.reader = slow
store.BATCH_BYTES = 1 << 14
convert(open_source(sys.argv[1]), sys.argv[2], describe, cache_dir=default_cache_dir())
"""
MEASURED = f"""{WATCHED}
import pathlib, sys
import transformers
from checkpoints_convert.convert import convert, open_source
from checkpoints_convert.json_files import read_json
from himap_jax.checkpoint import default_cache_dir, describe
from himap_jax.families import from_hf
from_hf(read_json(pathlib.Path(sys.argv[1], "config.json")))
before = start()
convert(open_source(sys.argv[1]), sys.argv[2], describe, cache_dir=default_cache_dir())
print(peak[0] - before)
"""


def test_a_killed_conversion_leaves_nothing_that_looks_finished(clip, expected, tmp_path):
  target = tmp_path / "target"
  assert commands.Command(KILLED, clip, target).killed_after("reading", count=40)
  assert not target.exists() and (tmp_path / ".target.partial").exists()
  assert_same_trees(flat_params(convert_to(clip, target)), expected)
  assert list(tmp_path.iterdir()) == [target]


@pytest.mark.sampled(of="memory")
def test_memory_is_bounded_by_tensors_and_not_by_the_model(clip, tmp_path):
  """Eight layers of 3 x 25 MB: 600 MB."""
  directory = tmp_path / "source"
  shapes = widen(clip, directory, num_layers=8)
  largest = max(map(math.prod, shapes.values()))
  numbers = np.random.default_rng(0).integers(0, 1 << 14, largest, dtype=np.uint16).view(ml_dtypes.bfloat16)
  for shard_index in range(4):
    save_file(
      {
        name: numbers[: math.prod(shape)].reshape(shape)
        for index, (name, shape) in enumerate(shapes.items())
        if index % 4 == shard_index
      },
      directory / f"part{shard_index}.safetensors",
    )
  total = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
  assert total > 600e6
  result = subprocess.run(
    [sys.executable, "-c", MEASURED, str(directory), str(tmp_path / "target")],
    capture_output=True,
    text=True,
    cwd=ROOT,
    check=True,
  )
  assert int(result.stdout) < 0.6 * total


def test_command(clip, expected, tmp_path):
  done = commands.Command("himap_jax.convert", f"--source={clip}", f"--target={tmp_path / 'target'}")
  assert done.succeeded().strip() == str(tmp_path / "target") and "orbax" not in done.text()[1]
  assert_same_trees(flat_params(tmp_path / "target"), expected)
  for given, target, message in (
    (tmp_path, "other", ""),
    (tmp_path / "target", "other", f"{tmp_path / 'target'}: already converted; himap_jax.run reads it as it is"),
    (clip, clip / "converted", f"--target={clip / 'converted'} is in the directory of the source"),
  ):
    refused = commands.Command("himap_jax.convert", f"--source={given}", f"--target={tmp_path / target}")
    _, errors = refused.communicate()
    assert refused.process.exitcode == 2
    assert errors.strip().splitlines()[-1].startswith(f"himap_jax.convert: {message}") and "Traceback" not in errors
