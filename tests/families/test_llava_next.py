"""LLaVA-NeXT against transformers: tiles, prompts, features, logits, tokens, and HiMAP against the slow reference."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_himap
import tiny_anyres
import tiny_checkpoints
import torch
import transformers
from safetensors.numpy import load_file, save_file

from himap_jax import GenerationConfig, InputConfig, UserError, checkpoint, generate
from himap_jax.engine import prefill, sharding
from himap_jax.engine.batching import Batcher, ImageBucket
from himap_jax.families.llava_next import LlavaNextProcessor

SIZES = [(40, 40), (64, 37), (30, 51), (28, 28), (1, 1), (200, 3), (3, 200), (57, 113), (1, 10_000), (10_000, 1)]
QUESTIONS = ("No picture here.", "<image>What is it?", "<image><image> or <image>, which is it?", "Why <image> so?")
TEMPLATE = "<image>{question}"
SHARES = ((2, 3), (0.5, 0.125))
NUM_NEW = 5
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  return tiny_anyres.make(tiny_anyres.NEXT, tmp_path_factory.mktemp("llava_next"))


@pytest.fixture(scope="module")
def loaded(tiny, tmp_path_factory):
  return checkpoint.load(str(tiny.directory), dtype=jnp.float32, cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def noise():
  return [tiny_checkpoints.noise_image(size, seed) for seed, size in enumerate(SIZES)]


@pytest.fixture(scope="module")
def rows(noise):
  """The pictures of each question; the last row has nearly as many image tokens as the second, and shares its bucket."""
  return [[], [noise[1]], [noise[0], noise[2], noise[5]], [noise[7]]]


@pytest.fixture(scope="module")
def together(loaded, rows):
  """Answers to all questions in one call."""
  return answer(loaded, rows, QUESTIONS, loaded.schedule("himap", *SHARES))


@pytest.fixture(scope="module")
def reference(tiny):
  return transformers.LlavaNextProcessor(
    tiny.image_processor,
    tiny_checkpoints.byte_tokenizer(),
    patch_size=7,
    vision_feature_select_strategy="default",
    num_additional_image_tokens=1,
    chat_template=tiny_checkpoints.CHAT_TEMPLATE,
  )


def answer(model, pictures, questions, schedule, batch_size=2):
  generation = GenerationConfig(NUM_NEW, ignore_eos=True)
  inputs = InputConfig(TEMPLATE, (60,), batch_size)
  return generate(model, pictures, questions, schedule=schedule, generation=generation, inputs=inputs)


def packed(processor, examples):
  """Each example in a batch of its own."""
  batcher = Batcher(512, processor.blank, [ImageBucket(*example.size) for example in examples], buckets=(60,))
  return [batcher.pack([own], bucket=batcher.bucket(own), batch_size=1) for own in examples]


class TestPrompts:
  @pytest.mark.parametrize("count", [1, 2, 3])
  def test_tokens_and_tiles_are_transformers_own(self, loaded, reference, noise, count):
    processor = loaded.prompts()
    for first in range(len(SIZES)):
      images = [noise[(first + number) % len(SIZES)] for number in range(count)]
      parts = [{"type": "image"}] * count + [{"type": "text", "text": "Why?"}]
      text = reference.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
      expected = reference(images=images, text=text, return_tensors="np", add_special_tokens=False)
      example = processor.prepare(images, "Why?")
      assert processor.prompt("Why?", count) == text
      assert example.tokens.tolist() == expected["input_ids"][0].tolist()
      sizes = [processor.image_size([image.size]) for image in images]
      tiles = np.concatenate([x[: own.num_tiles] for x, own in zip(expected["pixel_values"], sizes, strict=True)])
      np.testing.assert_array_equal(example.images.pixels, tiles.astype(np.float32))
      assert processor.image_size([image.size for image in images]) == example.size

  def test_a_thin_picture_is_newlines_alone_as_in_transformers(self, loaded):
    assert loaded.prompts().image_size([(1, 10_000)]).num_tokens == 16 + 4
    assert loaded.prompts().image_size([(10_000, 1)]).num_tokens == 16

  def test_views_and_places(self, tiny, loaded, noise):
    processor, images, own = loaded.prompts(), [noise[1], noise[8]], tiny.image_processor
    example = processor.prepare(images, "Why?")
    views, places = processor.views(example), processor.places(example)
    assert [view.tokens.shape for view in views] == [(4, 4), (4, 8), (4, 4)]
    assert [view.picture.size for view in views] == [(28, 28), (56, 28), (28, 28)]
    shown = np.concatenate([view.tokens.ravel() for view in views])
    index = example.images.pack_index[:, 0]
    assert np.flatnonzero(places[:, 2] < 0).tolist() == np.flatnonzero(index < 0).tolist()
    assert sorted(shown) == np.flatnonzero(index >= 0).tolist() and len(places) == example.num_image_tokens
    picture, tile, row, column = places[index >= 0].T
    assert ((np.array([0, 5])[picture] + tile) * 16 + row * 4 + column).tolist() == index[index >= 0].tolist()
    assert places[16 + 8].tolist() == [0, 2, -1, -1]
    for view in views:
      for (line, place), token in np.ndenumerate(view.tokens):  # the cell shows the patch that the token is made of
        tile, cell = divmod(index[token], 16)
        patch = example.images.pixels[tile, :, cell // 4 * 7 :, cell % 4 * 7 :][:, :7, :7]
        mean, std = (np.array(x)[:, None, None] for x in (own.image_mean, own.image_std))
        expected = ((patch * std + mean) * 255).clip(0, 255).round().transpose(1, 2, 0)
        found = np.asarray(view.picture)[line * 7 : line * 7 + 7, place * 7 : place * 7 + 7]
        np.testing.assert_allclose(found, expected, atol=1)

  def test_a_bound_leaves_out_large_grids(self, loaded):
    limited = LlavaNextProcessor(loaded.processor, loaded.config, max_image_tokens=16 + 4 * 9)
    sizes = [limited.image_size([size]) for size in SIZES]
    assert {size.num_tiles for size in sizes} == {3} and limited.image_size([(56, 28)]).num_tokens == 52
    with pytest.raises(UserError, match="at most 51 image tokens .* too few: this model's smallest grid has 52"):
      LlavaNextProcessor(loaded.processor, loaded.config, max_image_tokens=51)


def test_image_features_and_logits_at_every_position(tiny, loaded, rows, noise):
  processor = loaded.prompts(TEMPLATE)
  pictures = [rows[2], [noise[1], noise[8], noise[7]]]
  examples = [processor.prepare(own, "Why?") for own in pictures]
  run = jax.jit(lambda model, inputs: (model.bind().encode_images(inputs.images)[:2], model.bind()(inputs)))
  for own, example, batch in zip(pictures, examples, packed(processor, examples), strict=True):
    (features, tower), logits = run(loaded.model, jax.tree.map(jnp.asarray, batch))
    with torch.no_grad():
      expected = torch.cat(list(tiny.model.get_image_features(**tiny.pictures(own)).pooler_output))
      ids = torch.from_numpy(example.tokens).long()[None]
      whole = tiny.model(input_ids=ids, **tiny.pictures(own)).logits[0]
    np.testing.assert_allclose(features[0], expected, atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(logits[0, : len(example.tokens)], whole, atol=TOLERANCE, rtol=0)
    newlines = example.images.pack_index[:, 0] < 0
    assert tower.is_newline[0].tolist() == newlines.tolist()
    assert (np.asarray(tower.features[0])[newlines] == 0).all()
    tile, row, column = np.moveaxis(np.asarray(tower.grid[0]), -1, 0)[:, ~newlines]
    assert (16 * tile + 4 * row + column).tolist() == example.images.pack_index[~newlines, 0].tolist()


@pytest.fixture(scope="module")
def embedded(loaded, noise):
  """A prompt with one picture, and the same before the decoder."""
  processor = loaded.prompts(TEMPLATE)
  example = processor.prepare([noise[1]], "Why?")
  (batch,) = packed(processor, [example])
  return example, jax.jit(lambda model, inputs: model.bind().embed(inputs))(
    loaded.model, jax.tree.map(jnp.asarray, batch)
  )


class TestPruning:
  def test_himap_and_decoding_are_the_reference(self, tiny, loaded, rows, together):
    """Rows of no, one and three pictures in one call: kept sets, logits and tokens."""
    for own, question, found in zip(rows, QUESTIONS, together, strict=True):
      example = loaded.prompts(TEMPLATE).prepare(own, question)
      ids = torch.from_numpy(example.tokens).long()
      if not own:
        with torch.no_grad():
          expected = tiny.model.generate(ids[None], max_new_tokens=NUM_NEW, min_new_tokens=NUM_NEW, do_sample=False)
        assert found.token_ids == expected[0, len(ids) :].tolist() and found.kept == [[], []]
        continue
      keep = tuple(round(share * example.num_image_tokens) for share in SHARES[1])
      expected = reference_himap.generate(
        tiny.model, ids, tiny.pictures(own), prune_layers=SHARES[0], keep=keep, max_new_tokens=NUM_NEW
      )
      expected.assert_is(found.token_ids, found.kept, found.first_logits, clear=1e-6)

  @pytest.mark.sampled(of="meshes")
  def test_on_a_mesh(self, tiny, loaded, rows, together, tmp_path):
    schedule = loaded.schedule("himap", *SHARES)
    opened = checkpoint.open_checkpoint(str(tiny.directory), cache_dir=tmp_path)
    spread = opened.restore(dtype=jnp.float32, mesh=sharding.make_mesh(data=2, tensor=4))
    on_mesh = answer(spread, rows[1::2], QUESTIONS[1::2], schedule)
    for found, other in zip(together[1::2], on_mesh, strict=True):
      assert (found.token_ids, found.kept) == (other.token_ids, other.kept)
      np.testing.assert_allclose(found.first_logits, other.first_logits, atol=TOLERANCE, rtol=0)

  @pytest.mark.sampled
  @pytest.mark.parametrize("method", ["prumerge", "visionzip", "vispruner", "fastervlm", "fsr", "visiontrim"])
  def test_newlines_have_no_feature(self, loaded, embedded, method):
    """Methods that read features keep newlines last, and never replace one by a projection."""
    example, embedded = embedded
    newlines = example.images.pack_index[:, 0] < 0
    num_features, tokens = int((~newlines).sum()), example.num_image_tokens

    def pruned(model, embedded, schedule):
      context = prefill.Context(jax.random.split(jax.random.key(0), 1), embedded)
      sequence, _ = prefill.prune(model.bind(), schedule.stages[0], prefill.start(embedded), None, context)
      slots = sequence.layout.image_slots()
      return sequence.layout.original()[0], sequence.x[0, slots[0]]

    for keep in (num_features - 2, tokens - 1):
      schedule = loaded.schedule(method, keep=(keep,)).at(4, tokens)
      kept, x = jax.jit(pruned, static_argnums=2)(loaded.model, embedded, schedule)
      is_newline = newlines[kept]
      assert is_newline.sum() == max(0, keep - num_features)
      expected = np.broadcast_to(loaded.model.params["image_newline"], x[is_newline].shape)
      np.testing.assert_array_equal(x[is_newline], expected)


def changed(tiny, target, name="config.json", **fields):
  target.mkdir()
  for path in tiny.directory.iterdir():
    (target / path.name).write_bytes(path.read_bytes())
  content = json.loads((target / name).read_text())
  (target / name).write_text(json.dumps({k: v for k, v in (content | fields).items() if v is not None}))
  return target


class TestCheckpoints:
  def test_published_names(self, tiny, loaded, tmp_path):
    """Those of llava-hf/llava-v1.6-mistral-7b-hf, and those with `model.`."""
    directory = changed(tiny, tmp_path / "published")
    tensors = {plain(name): value for name, value in load_file(directory / "model.safetensors").items()}
    starts = {"vision_tower.": "vision_tower.vision_model.", "language_model.": "language_model.model."}
    published = {}
    for name, value in tensors.items():
      start = next((start for start in starts if name.startswith(start)), None)
      name = "language_model.lm_head.weight" if name == "lm_head.weight" else name
      published[name if start is None else starts[start] + name.removeprefix(start)] = value
    with_model = {name if name == "lm_head.weight" else f"model.{name}": value for name, value in tensors.items()}
    for names in (published, with_model):
      assert any(name.endswith("image_newline") for name in names)
      save_file(names, directory / "model.safetensors")
      again = checkpoint.load(str(directory), dtype=jnp.float32, cache_dir=tmp_path)
      same = jax.tree.map(lambda x, y: bool((x == y).all()), again.model.params, loaded.model.params)
      assert all(jax.tree.leaves(same))

  def test_without_a_newline(self, tiny, tmp_path):
    directory = changed(tiny, tmp_path / "next")
    tensors = load_file(directory / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "newline" not in k}, directory / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 missing \(image_newline\)"):
      checkpoint.open_checkpoint(str(directory), cache_dir=tmp_path)

  @pytest.mark.parametrize(
    ("fields", "message"),
    [
      ({"image_grid_pinpoints": None}, "config.json and the image processor have different image_grid_pinpoints"),
      ({"image_grid_pinpoints": [[28, 56], [28]]}, r"must be a list of \[height, width\], not \[\[28, 56\], \[28\]\]"),
      ({"image_grid_pinpoints": []}, "must be a list"),
      ({"image_grid_pinpoints": [[28, 28.5]]}, "holds 28.5, which is no multiple"),
      ({"image_grid_pinpoints": "anyres"}, "transformers cannot read it"),
      ({"image_grid_pinpoints": [[28, 30]]}, "holds 30, which is no multiple of the tower's image_size 28"),
      ({"vision_feature_select_strategy": "full"}, "'full' leaves no grid of patches with this tower; use default"),
      ({"vision_config": {"model_type": "dinov2"}}, "'dinov2' is not supported; supported: clip_vision_model"),
    ],
  )
  def test_config(self, tiny, tmp_path, fields, message):
    with pytest.raises(UserError, match=message) as error:
      checkpoint.open_checkpoint(str(changed(tiny, tmp_path / "next", **fields)), cache_dir=tmp_path)
    assert "\n" not in str(error.value)

  def test_tiles_of_another_size(self, tiny, tmp_path):
    directory = changed(tiny, tmp_path / "next", "preprocessor_config.json", crop_size={"height": 21, "width": 21})
    opened = checkpoint.open_checkpoint(str(directory), cache_dir=tmp_path)
    with pytest.raises(UserError, match="makes tiles of 21 x 21 pixels, and the tower reads 28 x 28"):
      opened.prompts()

  @pytest.mark.parametrize("name", ["preprocessor_config.json", "tokenizer.json"])
  def test_a_missing_file(self, tiny, tmp_path, name):
    directory = changed(tiny, tmp_path / "next")
    (directory / name).unlink()
    with pytest.raises(UserError, match="cannot load the tokenizer and image processor"):
      checkpoint.open_checkpoint(str(directory), cache_dir=tmp_path)

  def test_an_older_chat_template(self, tiny, tmp_path):
    directory = changed(tiny, tmp_path / "next")
    (directory / "chat_template.jinja").unlink()
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": "[INST]{{ messages[0]['role'] }}"}))
    assert checkpoint.open_checkpoint(str(directory), cache_dir=tmp_path).prompts().prompt("Why?") == "[INST]user"

  def test_more_pictures_than_the_context_holds(self, loaded, noise):
    with pytest.raises(UserError, match="context of 512 tokens does not hold 520 image tokens"):
      answer(loaded, [[noise[1]] * 10], ["Why?"], loaded.schedule("none"))


def plain(name):
  """A tensor's name without the levels that versions add."""
  name = name.removeprefix("model.").replace("vision_model.", "").replace("language_model.model.", "language_model.")
  return name.replace("language_model.lm_head", "lm_head")
