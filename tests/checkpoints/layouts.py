"""Copies of tiny checkpoints in every layout, and what a directory holds once it is converted or read as it is."""

import json
import pathlib
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from checkpoints_convert import convert, names
from checkpoints_convert.stored import StoredTensor
from himap_jax import checkpoint

WEIGHTS = "model.safetensors"


def convert_to(directory, target, *, vision_tower=None, allow_pickle=False, **options):
  """Converts a directory; digests are kept where `$HIMAP_JAX_CACHE` says."""
  source = convert.open_source(str(directory), vision_tower, allow_pickle=allow_pickle)
  return convert.convert(source, target, checkpoint.describe, cache_dir=checkpoint.default_cache_dir(), **options)


def refuses(directory, target, match, *, allow_pickle=False, **options):
  """Neither converts nor opens a directory, for the reason that matches; gives the message."""
  with pytest.raises(ValueError, match=match):
    checkpoint.open_checkpoint(str(directory), cache_dir=target.parent / "cache", allow_pickle=allow_pickle)
  with pytest.raises(ValueError, match=match) as error:
    convert_to(directory, target, allow_pickle=allow_pickle, **options)
  assert "\n" not in str(error.value) and not target.exists()
  return str(error.value)


def flat_params(directory, dtype=jnp.float32, *, mesh=None, allow_pickle=False, **options):
  """The parameters of a directory, by their paths with slashes."""
  opened = checkpoint.open_checkpoint(str(directory), allow_pickle=allow_pickle)
  params = opened.restore(dtype=dtype, mesh=mesh, **options).model.params
  return traverse_util.flatten_dict(params, sep="/")


def assert_same_trees(left, right):
  assert left.keys() == right.keys()
  for path in left:
    np.testing.assert_array_equal(np.asarray(left[path]), np.asarray(right[path]), err_msg=path)


def tree_path(name):
  """The path with slashes of a name in a LLaVA checkpoint."""
  tensor = StoredTensor(name, pathlib.Path(), "F32", (), lambda path, name: np.asarray)
  (parameter,) = names.place_names([tensor], names.TABLES["llava"].entries, {})
  return "/".join(parameter.path)


def copy_of(directory, target, *, rename=lambda name: name, change=lambda tensors: tensors, fields=None):
  """A copy of a checkpoint with its tensors renamed, then changed, and fields of its config.json replaced."""
  shutil.copytree(directory, target)
  tensors = {rename(name): value for name, value in load_file(directory / WEIGHTS).items()}
  save_file(change(tensors), target / WEIGHTS)
  if fields:
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | fields))
  return target


def shard(directory, num_shards=3):
  """Splits `model.safetensors` into shards with an index."""
  tensors = load_file(directory / WEIGHTS)
  weight_map = {
    name: f"model-{index % num_shards + 1:05d}-of-{num_shards:05d}.safetensors"
    for index, name in enumerate(sorted(tensors))
  }
  for file in set(weight_map.values()):
    save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, directory / file)
  (directory / WEIGHTS).unlink()
  (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
  return directory


def older_name(name):
  return re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name)


def newer_name(name):
  if name.startswith("language_model.lm_head."):
    return name.removeprefix("language_model.")
  return "model." + name.replace("language_model.model.", "language_model.", 1)


def original_name(name):
  name = name.removeprefix("language_model.")
  name = name.replace("multi_modal_projector.linear_1.", "model.mm_projector.0.")
  name = name.replace("multi_modal_projector.linear_2.", "model.mm_projector.2.")
  return re.sub(r"^vision_tower\.", "model.vision_tower.vision_tower.vision_model.", name)


def make_original(directory, target, *, tower_inside):
  """The original layout of a Hugging Face LLaVA with a CLIP tower, and the tower's own checkpoint in `clip`."""
  fields = json.loads((directory / "config.json").read_text())
  tensors = load_file(directory / WEIGHTS)
  processor = json.loads((directory / "processor_config.json").read_text())["image_processor"]
  (target / "clip").mkdir(parents=True)
  tower = {
    name.replace("vision_tower.", "vision_model."): value
    for name, value in tensors.items()
    if name.startswith("vision_tower.")
  }
  save_file(
    tower
    | {
      "logit_scale": np.zeros((), np.float32),
      "text_model.x.weight": np.zeros(3, np.float32),
      "visual_projection.weight": np.zeros((2, 2), np.float32),
    },
    target / "clip" / WEIGHTS,
  )
  vision = {name: value for name, value in fields["vision_config"].items() if name != "model_type"}
  (target / "clip/config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision}))
  side = processor["crop_size"]["height"]
  (target / "clip/preprocessor_config.json").write_text(
    json.dumps(
      {
        "feature_extractor_type": "CLIPFeatureExtractor",
        "size": side,
        "crop_size": side,
        "do_resize": True,
        "do_center_crop": True,
        "do_normalize": True,
        "resample": 3,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
      }
    )
  )

  save_file(
    {
      original_name(name): value
      for name, value in tensors.items()
      if tower_inside or not name.startswith("vision_tower.")
    },
    target / WEIGHTS,
  )
  write_original_settings(directory, target, mm_vision_tower="clip", mm_vision_select_layer=-2)
  return target


def write_original_settings(directory, target, **fields):
  """Writes the config.json and tokenizer of the original layout of a Hugging Face LLaVA."""
  text = json.loads((directory / "config.json").read_text())["text_config"]
  text = {name: value for name, value in text.items() if name != "rope_parameters"}
  (target / "config.json").write_text(
    json.dumps(
      text
      | {
        "model_type": "llava",
        "architectures": ["LlavaLlamaForCausalLM"],
        "rope_theta": 10_000.0,
        "rope_scaling": None,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_start_end": False,
        "image_aspect_ratio": "pad",
      }
      | fields
    )
  )
  transformers.AutoTokenizer.from_pretrained(directory).save_pretrained(target)
