"""LLaVA-OneVision on pictures against transformers: prompts, tiles, shrunk grids, features, logits, and HiMAP."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_himap
import tiny_anyres
import tiny_checkpoints
import torch
import transformers
from PIL import Image
from test_llava_next import changed

from himap_jax import GenerationConfig, InputConfig, UserError, checkpoint, generate
from himap_jax.engine import sharding
from himap_jax.engine.batching import Batcher, Bucket, ImageBucket
from himap_jax.engine.engine import Engine
from himap_jax.families.llava_onevision import LlavaOnevisionProcessor

# The third and the last have more than 1.1² times the image tokens of two tiles.
SIZES = [(40, 40), (64, 37), (62, 60), (28, 28), (1, 1), (200, 3), (57, 113), (1, 10_000), (10_000, 1), (93, 31)]
QUESTIONS = ("No picture here.", "<image>What is it?", "<image><image> or <image>, which is it?")
TEMPLATE = "<image>{question}"
SHARES = ((2, 3), (0.5, 0.125))
NUM_NEW = 5
GENERATION = GenerationConfig(NUM_NEW, ignore_eos=True)
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  return tiny_anyres.make(tiny_anyres.ONEVISION, tmp_path_factory.mktemp("llava_onevision"))


@pytest.fixture(scope="module")
def loaded(tiny, tmp_path_factory):
  return checkpoint.load(str(tiny.directory), dtype=jnp.float32, cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def noise():
  return [tiny_checkpoints.noise_image(size, seed) for seed, size in enumerate(SIZES)]


@pytest.fixture(scope="module")
def rows(noise):
  """The pictures of each question; those with pictures have five and three tiles."""
  return [[], [noise[2]], [noise[0], noise[1], noise[5]]]


@pytest.fixture(scope="module")
def expected(tiny, loaded, rows):
  """The reference's answers to the rows with pictures, each alone."""
  answers = []
  for own, question in zip(rows[1:], QUESTIONS[1:], strict=True):
    example = loaded.prompts(TEMPLATE).prepare(own, question)
    keep = tuple(round(share * example.num_image_tokens) for share in SHARES[1])
    prompt = tiny.model, torch.from_numpy(example.tokens).long(), tiny.pictures(own)
    answers.append(reference_himap.generate(*prompt, prune_layers=SHARES[0], keep=keep, max_new_tokens=NUM_NEW))
  return answers


class Reference(transformers.LlavaOnevisionProcessor):
  """Does without the processor of videos, which needs torchvision."""

  def check_argument_for_proper_class(self, argument_name, argument):
    if argument_name != "video_processor":
      super().check_argument_for_proper_class(argument_name, argument)


@torch.no_grad()
def reference_features(tiny, images):
  return torch.cat(list(tiny.model.get_image_features(**tiny.pictures(images)).pooler_output))


def test_prompts_and_tokens_are_transformers_own(tiny, loaded, noise):
  """Of no picture, of one of any size, and of several."""
  reference = Reference(
    tiny.image_processor,
    tiny_checkpoints.byte_tokenizer(),
    None,
    num_image_tokens=25,
    vision_feature_select_strategy="full",
    chat_template=tiny_checkpoints.CHAT_TEMPLATE,
    vision_aspect_ratio="anyres_max_2",
  )
  processor = loaded.prompts()
  for own in [[], *([image] for image in noise), noise[:2], noise[4:7]]:
    parts = [{"type": "image"}] * len(own) + [{"type": "text", "text": "Why?"}]
    text = reference.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    inputs = reference(images=[own] if own else None, text=text, add_special_tokens=False)
    assert processor.prompt("Why?", len(own)) == text
    assert processor.prepare(own, "Why?").tokens.tolist() == inputs["input_ids"][0]


class TestPictures:
  def test_tiles_and_counts_are_transformers_own(self, tiny, loaded, noise):
    processor = loaded.prompts(TEMPLATE)
    for own in [*([image] for image in noise), noise[:2], noise[4:7]]:
      example = processor.prepare(own, "Why?")
      expected = tiny.pictures(own)["pixel_values"].flatten(0, 1).numpy().astype(np.float32)
      np.testing.assert_array_equal(example.images.pixels, expected)
      assert processor.image_size([image.size for image in own]) == example.size
      assert example.num_image_tokens == len(reference_features(tiny, own))

  def test_views_and_places(self, loaded, noise):
    processor = loaded.prompts(TEMPLATE)
    for own, shapes in (([noise[2]], [(5, 5), (7, 7)]), ([noise[1]], [(5, 5), (6, 10)]), (noise[:2], [(5, 5)] * 2)):
      example = processor.prepare(own, "Why?")
      views, places = processor.views(example), processor.places(example)
      assert [view.tokens.shape for view in views] == shapes
      shown = np.concatenate([view.tokens.ravel() for view in views])
      assert sorted(shown) == np.flatnonzero(places[:, 2] >= 0).tolist()
      weights, index = example.images.pack_weight, example.images.pack_index
      np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)
      assert np.array_equal(np.flatnonzero(places[:, 2] < 0), np.flatnonzero((index < 0).all(axis=1)))
    assert places[25].tolist() == [0, 0, -1, -1] and places[26].tolist() == [1, 0, 0, 0]

  def test_a_bound_leaves_out_large_grids(self, loaded):
    random = np.random.default_rng(0)
    sizes = [tuple(size) for size in random.integers(1, 400, (60, 2)).tolist()]
    counts = set()
    for bound in (80, 85, 95, None):
      limited = LlavaOnevisionProcessor(loaded.processor, loaded.config, max_image_tokens=bound)
      found = [limited.image_size([size]).num_tokens for size in sizes]
      assert bound is None or max(found) <= bound
      counts.add(sum(found))
    assert len(counts) > 1

  def test_a_square_that_would_exhaust_memory(self, loaded):
    pictures = [Image.new("RGB", (14_000, 1)), Image.new("RGB", (2, 2))]
    with pytest.raises(UserError, match="has 14000 x 1 pixels; padded to a square it is above the limit"):
      loaded.prompts(TEMPLATE).prepare(pictures, "Why?")


def test_image_features_and_logits_at_every_position(tiny, loaded, noise):
  processor = loaded.prompts(TEMPLATE)
  pictures = [noise[:3]]  # the first two as they are, the third shrunk
  run = jax.jit(lambda model, inputs: (model.bind().encode_images(inputs.images)[:2], model.bind()(inputs)))
  for own in pictures:
    example = processor.prepare(own, "Why?")
    batcher = Batcher(512, processor.blank, [ImageBucket(*example.size)], buckets=(60,))
    batch = batcher.pack([example], bucket=batcher.bucket(example), batch_size=1)
    (features, _), logits = run(loaded.model, jax.tree.map(jnp.asarray, batch))
    np.testing.assert_allclose(features[0], reference_features(tiny, own), atol=TOLERANCE, rtol=0)
    ids = torch.from_numpy(example.tokens).long()[None]
    with torch.no_grad():
      whole = tiny.model(input_ids=ids, **tiny.pictures(own)).logits[0]
    np.testing.assert_allclose(logits[0, : len(example.tokens)], whole, atol=TOLERANCE, rtol=0)


class TestPruning:
  def test_himap_and_decoding_are_the_reference(self, tiny, loaded, rows, expected):
    """Rows of no, one and three pictures in one call; each is as the reference has it alone."""
    schedule, inputs = loaded.schedule("himap", *SHARES), InputConfig(TEMPLATE, (60,), 2)
    text, *answers = generate(loaded, rows, QUESTIONS, schedule=schedule, generation=GENERATION, inputs=inputs)
    ids = torch.from_numpy(loaded.prompts(TEMPLATE).prepare([], QUESTIONS[0]).tokens).long()
    with torch.no_grad():
      whole = tiny.model.generate(ids[None], max_new_tokens=NUM_NEW, min_new_tokens=NUM_NEW, do_sample=False)
    assert text.token_ids == whole[0, len(ids) :].tolist() and text.kept == [[], []]
    for found, alone in zip(answers, expected, strict=True):
      alone.assert_is(found.token_ids, found.kept, found.first_logits, clear=1e-6)

  def test_rows_padded_to_one_bucket_on_a_mesh(self, tiny, rows, expected, tmp_path):
    """Two on each pair of devices, each padded to more tiles and tokens; all are as the reference has them alone."""
    opened = checkpoint.open_checkpoint(str(tiny.directory), cache_dir=tmp_path)
    spread = opened.restore(dtype=jnp.float32, mesh=sharding.make_mesh(data=2, tensor=2))
    processor, order = opened.prompts(TEMPLATE), (0, 1, 1, 0)
    examples = [processor.prepare(rows[1 + row], QUESTIONS[1 + row]) for row in order]
    assert {example.size.num_tiles for example in examples} == {3, 5}
    bucket = Bucket(6, max(example.num_image_tokens for example in examples) + 3, 60, is_ragged=True)
    batcher = Batcher(512, processor.blank, [ImageBucket(*bucket[:2], is_ragged=True)], buckets=(60,))
    engine = Engine(spread.model, opened.schedule("himap", *SHARES), GENERATION)
    found = engine(batcher.pack(examples, bucket=bucket, batch_size=4), range(4))
    for number, row in enumerate(order):
      kept = [stage[number] for stage in found.kept]
      expected[row].assert_is(found.tokens[number], kept, found.logits[number], clear=1e-6)

  @pytest.mark.parametrize("method", ["fastervlm", "visionzip", "vispruner", "prumerge+himap"])
  def test_methods_that_read_the_tower_list_those_that_do_not(self, loaded, method):
    with pytest.raises(UserError, match="methods that work: cdpruner, .*himap"):
      loaded.schedule(method)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"vision_aspect_ratio": "pad"}, "vision_aspect_ratio is 'pad'; supported: anyres_max_ and a number"),
    ({"vision_feature_select_strategy": "default"}, "'default' leaves no grid of patches with this tower; use full"),
    ({"image_grid_pinpoints": [[31, 30]]}, "holds 30, which is no multiple of the tower's image_size 31"),
  ],
)
def test_bad_checkpoints(tiny, tmp_path, fields, message):
  with pytest.raises(UserError, match=message) as error:
    checkpoint.open_checkpoint(str(changed(tiny, tmp_path / "onevision", **fields)), cache_dir=tmp_path)
  assert "\n" not in str(error.value)
