"""What InternVL has besides `test_tiled`: the options of its larger tower, and its errors."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_tiled
import torch
from tiny_checkpoints import noise_image

from himap_jax import UserError, checkpoint


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  return tiny_tiled.make("internvl_6b", tmp_path_factory.mktemp("internvl_6b"))


def test_logits_of_the_larger_tower_s_options(tiny, tmp_path):
  """RMS norms, norms of queries and keys, a norm after the tower, and Qwen2."""
  loaded = checkpoint.load(str(tiny.directory), dtype=jnp.float32, cache_dir=tmp_path)
  example = loaded.prompts().prepare([noise_image((60, 30), 2)], "Why?")
  actual, _ = jax.jit(lambda model, images: model.bind().encode_images(images)[:2])(
    loaded.model, jax.tree.map(lambda x: jnp.asarray(x)[None], example.images)
  )
  with torch.no_grad():
    expected = tiny.features(torch.from_numpy(example.images.pixels))
  np.testing.assert_allclose(actual[0], expected, atol=1e-4, rtol=0)
  assert loaded.config.vision.final_norm


@pytest.mark.parametrize(
  ("file", "fields", "message"),
  [
    ("config.json", {"text_config": {"model_type": "gpt_oss"}}, "'gpt_oss' is not supported; supported: qwen2, qwen3,"),
    ("config.json", {"vision_config": {"model_type": "eva"}}, "vision tower 'eva' is not supported"),
    ("config.json", {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy 'full' is not supp"),
    ("config.json", {"vision_feature_layer": [1, 2]}, r"vision_feature_layer \[1, 2\] is not supported"),
    ("config.json", {"downsample_ratio": 0.3}, "downsample_ratio 0.3 is not supported"),
    (
      "config.json",
      {"vision_config": {"model_type": "internvl_vision", "image_size": 28, "patch_size": 5}},
      "groups 2 by 2 patches, which does not divide the 5 patches of a tile's side",
    ),
    (
      "config.json",
      {"image_token_id": 5},
      "token has the id 5 in config.json, but <IMG_CONTEXT> has 262 in the tokenizer",
    ),
    ("preprocessor_config.json", {"min_patches": 5}, "min_patches 5 and max_patches 4 allow no number of tiles"),
    ("preprocessor_config.json", {"size": {"height": 28, "width": 56}}, "tiles of 28 x 56 pixels are not supported"),
    (
      "preprocessor_config.json",
      {"size": {"height": 35, "width": 35}},
      "35 pixels have 5 patches a side, which cannot",
    ),
  ],
)
def test_bad_checkpoints(tiny, tmp_path, file, fields, message):
  directory = tiny_tiled.changed(tiny, tmp_path / "internvl", file, **fields)
  with pytest.raises(UserError, match=message) as error:
    checkpoint.open_checkpoint(str(directory), cache_dir=tmp_path).prompts()
  assert "\n" not in str(error.value)


def test_a_question_with_the_image_token(tiny, tmp_path):
  processor = checkpoint.open_checkpoint(str(tiny.directory), cache_dir=tmp_path).prompts()
  with pytest.raises(UserError, match="the prompt has 2 <IMG_CONTEXT> for 1 picture; a question may not hold it"):
    processor.prepare([noise_image((28, 28), 0)], "What is <IMG_CONTEXT>?")


def test_a_published_head_is_its_own_unless_config_says_otherwise(tiny):
  """transformers' default is a tied one."""
  fields = json.loads((tiny.directory / "config.json").read_text())
  ties = [
    checkpoint.describe(own, "config.json").fields["tie_word_embeddings"]
    for own in (
      {name: value for name, value in fields.items() if name != "tie_word_embeddings"},
      fields | {"tie_word_embeddings": True},
    )
  ]
  assert ties == [False, True]
