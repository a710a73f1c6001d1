"""What Idefics3 and SmolVLM have besides `test_tiled`: grids of tiles at true sizes, other scale factors, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_tiled
import torch
import transformers
from tiny_checkpoints import noise_image
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import SizeDict
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings

from himap_jax import UserError, checkpoint
from himap_jax.families.idefics3 import tiles_of


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  return tiny_tiled.make("idefics3", tmp_path_factory.mktemp("idefics3"))


@pytest.mark.parametrize(
  ("longest", "side"), [(2048, 512), (1820, 364), (1536, 384), (5000, 512), (1537, 512), (999, 333), (None, 364)]
)
def test_grids_are_those_of_the_image_processor(monkeypatch, longest, side):
  """Its own code on shapes alone."""
  monkeypatch.setattr(
    PilBackend, "resize", lambda self, image, size, **_: np.broadcast_to(np.uint8(0), (3, size.height, size.width))
  )
  processor = transformers.Idefics3ImageProcessorPil()
  rng = np.random.default_rng(0)
  sizes = [
    (1, 1),
    (1, 10_000),
    (10_000, 1),
    (side, side),
    (side + 1, side),
    (333, 333),
    (300, 100),
    (100, 300),
    (640, 480),
    (480, 640),
  ]
  for width, height in [*sizes, *np.exp(rng.uniform(0, 9, (300, 2))).astype(int).tolist()]:
    image = np.broadcast_to(np.uint8(0), (3, height, width))
    if longest is not None:
      image = processor.resize(image, SizeDict(longest_edge=longest))
    image = processor.resize_for_vision_encoder(image, side)
    _, rows, columns = processor.split_images(image, {"longest_edge": side})
    assert tiles_of((width, height), side, longest) == (max(rows, 1), max(columns, 1)), (width, height)


@pytest.mark.parametrize("side", [16, 24, 26, 27, 32])
def test_positions_are_siglip_s_at_the_published_sizes(side):
  """Their fractional coordinates fall into the patches' own buckets."""
  config = transformers.models.idefics3.Idefics3VisionConfig(hidden_size=2, patch_size=2, image_size=2 * side)
  embeddings = Idefics3VisionEmbeddings(config)
  with torch.no_grad():
    found = embeddings(torch.zeros(1, 3, 2 * side, 2 * side), torch.ones(1, side, side, dtype=torch.bool))
  expected = embeddings.position_embedding.weight + embeddings.patch_embedding.bias
  torch.testing.assert_close(found[0], expected)


def test_without_splitting_and_with_another_scale_factor(tiny, tmp_path):
  """16 patches become one token; pictures are squeezed into one tile."""
  config = transformers.Idefics3Config(**tiny.model.config.to_dict() | {"scale_factor": 4})
  model = transformers.Idefics3ForConditionalGeneration(config).eval()
  directory = tiny_tiled.changed(tiny, tmp_path / "other", "preprocessor_config.json", do_image_splitting=False)
  model.save_pretrained(directory)
  loaded = checkpoint.load(str(directory), dtype=jnp.float32, cache_dir=tmp_path)
  processor, image = loaded.prompts(), noise_image((100, 40), 2)
  example = processor.prepare([image], "Why?")
  assert example.size == processor.image_size([image.size]) == (1, 1)
  actual, _ = jax.jit(lambda model, images: model.bind().encode_images(images)[:2])(
    loaded.model, jax.tree.map(lambda x: jnp.asarray(x)[None], example.images)
  )
  with torch.no_grad():
    (expected,) = model.get_image_features(torch.from_numpy(example.images.pixels)[None]).pooler_output
  np.testing.assert_allclose(actual[0], expected, atol=1e-4, rtol=0)


def test_the_whole_model_decides_whether_the_head_is_tied(tiny):
  """As in transformers, where `text_config` alone may say otherwise."""
  fields = tiny.model.config.to_dict()
  for whole in (False, True):
    own = fields | {"tie_word_embeddings": whole, "text_config": fields["text_config"] | {"tie_word_embeddings": True}}
    assert (("lm_head", "weight") in checkpoint.describe(own, "config.json").shapes) is not whole


@pytest.mark.parametrize(
  ("file", "fields", "message"),
  [
    (
      "config.json",
      {"text_config": {"model_type": "mamba"}},
      "language model 'mamba' is not supported; supported: lla",
    ),
    ("config.json", {"scale_factor": 3}, "scale_factor 3 does not divide the 4 patches of a tile's side"),
    ("config.json", {"scale_factor": "two"}, "scale_factor is 'two'; needed: a whole number"),
    ("config.json", {"image_token_id": 5}, "token has the id 5 in config.json, but <image> has 3 in the tokenizer"),
    ("config.json", {"image_token_id": 10**5}, "token has the id 100000 in config.json, but <image> has 3 in"),
    ("preprocessor_config.json", {"max_image_size": {"longest_edge": 35}}, "max_image_size is 35; .* needs 28"),
    ("preprocessor_config.json", {"size": {"height": 56, "width": 56}}, "size without longest_edge is not supported"),
  ],
)
def test_bad_checkpoints(tiny, tmp_path, file, fields, message):
  directory = tiny_tiled.changed(tiny, tmp_path / "idefics3", file, **fields)
  with pytest.raises(UserError, match=message) as error:
    checkpoint.open_checkpoint(str(directory), cache_dir=tmp_path).prompts()
  assert "\n" not in str(error.value)
