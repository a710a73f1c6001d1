"""InternVL-Chat-V1.0: LLaVA's original layout with InternViT-6B under its own names, and InternVL's image processing."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import traverse_util
from layouts import (
  WEIGHTS,
  assert_same_trees,
  convert_to,
  flat_params,
  original_name,
  refuses,
  tree_path,
  write_original_settings,
)
from PIL import Image
from safetensors.numpy import load_file, save_file

from checkpoints_convert import original
from himap_jax import checkpoint
from himap_jax.inputs import Images

pytestmark = pytest.mark.usefixtures("cache")
SIDE = 42
TOWER = "InternViT-6B-224px"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RENAMED = {
  "embeddings.cls_token": "embeddings.class_embedding",
  "embeddings.position_embeddings": "embeddings.position_embedding",
  "embeddings.patch_embeddings.projection": "embeddings.patch_embedding",
  "encoder.layer.": "encoder.layers.",
  "layernorm_before": "norm1",
  "layernorm_after": "norm2",
  "lambda_1": "ls1",
  "lambda_2": "ls2",
  "attention.projection_layer": "attn.proj",
  "attention.q_norm": "attn.q_norm",
  "attention.k_norm": "attn.k_norm",
}


@pytest.fixture(scope="module")
def tiny(checkpoints):
  return checkpoints("internvit")


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
  monkeypatch.setattr(original, "_INTERNVIT_SIDE", SIDE)


def authors_tower(tensors):
  """The tower's tensors under the authors' names, with queries, keys and values in one."""
  tower = {name.removeprefix("vision_tower."): x for name, x in tensors.items() if name.startswith("vision_tower.")}
  for name in [name for name in tower if ".q_proj." in name]:
    parts = [tower.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
    tower[name.replace("attention.q_proj.", "attn.qkv.")] = np.concatenate(parts)
  for ours, theirs in RENAMED.items():
    tower = {name.replace(ours, theirs): x for name, x in tower.items()}
  return tower


def make_internvl(directory, target, *, tower_inside=False, **fields):
  """A tiny checkpoint as OpenGVLab/InternVL-Chat-ViT-6B-Vicuna-7B, and its tower as OpenGVLab/InternViT-6B-224px."""
  tensors = load_file(directory / WEIGHTS)
  tower = authors_tower(tensors)
  (target / TOWER).mkdir(parents=True)
  save_file(tower, target / TOWER / WEIGHTS)
  vision = json.loads((directory / "config.json").read_text())["vision_config"]
  same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act")
  (target / TOWER / "config.json").write_text(
    json.dumps(
      {name: vision[name] for name in (*same, "layer_norm_eps")}
      | {"model_type": "intern_vit_6b", "image_size": 28, "patch_size": 7, "qk_normalization": True, "qkv_bias": False}
      | {"auto_map": {"AutoModel": "modeling_intern_vit.InternVisionModel"}}
    )
  )
  inside = {f"model.vision_tower.vision_tower.{name}": x for name, x in tower.items()} if tower_inside else {}
  rest = {original_name(name): x for name, x in tensors.items() if not name.startswith("vision_tower.")}
  save_file(rest | inside, target / WEIGHTS)
  write_original_settings(directory, target, **{"mm_vision_tower": TOWER, "mm_vision_select_layer": -4} | fields)
  return target


@pytest.mark.parametrize("tower_inside", [False, True])
def test_the_authors_checkpoint_is_the_hugging_face_one(tiny, tmp_path, tower_inside):
  target = convert_to(
    make_internvl(tiny.directory, tmp_path / "source", tower_inside=tower_inside), tmp_path / "target"
  )
  tensors = {tree_path(name): x for name, x in load_file(tiny.directory / WEIGHTS).items()}
  found = flat_params(target)
  assert_same_trees(found, {path: tensors[path] for path in found})
  ours, theirs = checkpoint.open_checkpoint(str(target)).config, checkpoint.open_checkpoint(str(tiny.directory)).config
  assert (ours.vision, ours.text, ours.connector) == (theirs.vision, theirs.text, theirs.connector)


def test_pictures_are_padded_with_the_mean_and_normalised_as_imagenet(tiny, tmp_path, images):
  opened = checkpoint.open_checkpoint(str(make_internvl(tiny.directory, tmp_path / "source")), cache_dir=tmp_path)
  processor = opened.prompts("vicuna_v1")
  assert processor.num_image_tokens == (SIDE // 7) ** 2
  sides = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
  reference = transformers.CLIPImageProcessorPil(image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD, **sides)
  for image in images:
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(mean * 255) for mean in IMAGENET_MEAN))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    expected = reference(square, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(processor.prepare([image], "Why?").images.pixels[0], expected, atol=1e-6)


@pytest.mark.parametrize("name", ["./pretrained/intern_vit_6b_224px/", "/mnt/InternViT-6B-224px"])
def test_a_tower_named_by_a_path_of_the_authors_comes_from_the_hub(tiny, tmp_path, monkeypatch, name):
  directory, asked = make_internvl(tiny.directory, tmp_path / "source", mm_vision_tower=name), []

  def download(name, **_):
    asked.append(name)
    return str(directory / TOWER)

  monkeypatch.setattr("huggingface_hub.snapshot_download", download)
  convert_to(directory, tmp_path / "target")
  assert asked == ["OpenGVLab/InternViT-6B-224px"]


def test_the_class_token_s_attention_is_that_of_the_tower(tiny, loaded, images):
  pixels = tiny.encode(images[0], "<image>")[1]
  attentions = tiny.model.model.vision_tower(pixels, output_attentions=True).attentions
  expected = attentions[1][0, :, 0, 1:].mean(dim=0).detach().numpy()  # the layer that makes hidden state -4 of 5
  model = loaded("internvit").model
  _, tower = jax.jit(lambda model, images: model.bind().encode_images(images)[:2])(
    model, Images(jnp.asarray(pixels.numpy())[:, None])
  )
  np.testing.assert_allclose(tower.class_attention[0], expected, atol=1e-6)


def test_a_fused_tensor_of_another_shape(tiny, tmp_path):
  directory = make_internvl(tiny.directory, tmp_path / "source")
  tower = load_file(directory / TOWER / WEIGHTS)
  name = "encoder.layers.0.attn.qkv.weight"
  save_file(tower | {name: tower[name][:-3]}, directory / TOWER / WEIGHTS)
  refuses(directory, tmp_path / "target", rf"mis-shaped \({name} is \[87, 30\], expected \[90, 30\]")


def test_an_unknown_tower(tiny, tmp_path):
  directory = make_internvl(tiny.directory, tmp_path / "source")
  fields = json.loads((directory / TOWER / "config.json").read_text())
  (directory / TOWER / "config.json").write_text(json.dumps(fields | {"model_type": "eva"}))
  refuses(directory, tmp_path / "target", "model_type is 'eva'; the original layout needs a CLIP or an InternViT tower")


def test_as_published_in_pickled_shards(tiny, tmp_path):
  """The language model in `.bin` shards with an index, the tower in one of its own."""
  directory = make_internvl(tiny.directory, tmp_path / "source")
  expected = flat_params(convert_to(directory, tmp_path / "expected"))
  tensors = {name: torch.from_numpy(x.copy()) for name, x in load_file(directory / WEIGHTS).items()}
  shards = {name: f"pytorch_model-{number % 2 + 1:05d}-of-00002.bin" for number, name in enumerate(tensors)}
  for file in set(shards.values()):
    torch.save({name: tensors[name] for name in tensors if shards[name] == file}, directory / file)
  (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
  tower = {name: torch.from_numpy(x.copy()) for name, x in load_file(directory / TOWER / WEIGHTS).items()}
  torch.save(tower, directory / TOWER / "pytorch_model.bin")
  for path in (directory / WEIGHTS, directory / TOWER / WEIGHTS):
    path.unlink()
  refuses(directory, tmp_path / "target", "--allow_pickle")
  opened = checkpoint.open_checkpoint(str(directory), cache_dir=tmp_path, allow_pickle=True)
  params = opened.restore(dtype=jnp.float32).model.params
  assert_same_trees(traverse_util.flatten_dict(params, sep="/"), expected)
