"""InternVL and Idefics3 against transformers: prompts, tiles, features, logits, tokens, HiMAP, float32."""

import json

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_himap
import tiny_tiled
import torch
from jinja2 import TemplateError
from tiny_checkpoints import noise_image

from checkpoints_convert import convert
from himap_jax import GenerationConfig, InputConfig, UserError, checkpoint, generate
from himap_jax.engine import sharding
from himap_jax.engine.batching import Batcher, Bucket, ImageBucket, image_buckets
from himap_jax.engine.engine import Engine
from himap_jax.families.family import Message

NAMES = ("internvl", "idefics3", "smolvlm")
TOLERANCE = 1e-4
NUM_NEW = 6
GENERATION = GenerationConfig(NUM_NEW, ignore_eos=True)
SHARES = ((1, 3), (0.5, 0.25))
SIZES = [(1, 1), (28, 28), (29, 28), (60, 20), (20, 60), (100, 33), (640, 480), (480, 640), (1, 10_000), (10_000, 1)]
ROWS = ([], [(30, 90)], [(64, 37), (28, 28), (50, 51)])
QUESTIONS = ("Why is it so?", "What is it?", "Is <image> as <image> or as <image> here?")


@pytest.fixture(scope="module", params=NAMES)
def tiny(request, tmp_path_factory):
  return tiny_tiled.make(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def loaded(tiny, tmp_path_factory):
  return checkpoint.load(str(tiny.directory), dtype=jnp.float32, cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def rows():
  """The pictures of each question."""
  return [[noise_image(size, number) for number, size in enumerate(own)] for own in ROWS]


@pytest.fixture(scope="module")
def answers(loaded, rows):
  """Of the rows of no and three pictures."""
  return answer(loaded, rows[::2], QUESTIONS[::2])


def answer(loaded, rows, questions, batch_size=3):
  inputs = InputConfig("chat", (400,), batch_size)
  schedule = loaded.schedule("himap", *SHARES)
  return generate(loaded, rows, questions, schedule=schedule, generation=GENERATION, inputs=inputs)


def parts(*texts):
  return [{"type": "image"} if text == "<image>" else {"type": "text", "text": text} for text in texts]


CONVERSATIONS = (
  (1, "Why?", [("user", parts("<image>", "Why?"))]),
  (2, "Why?", [("user", parts("<image>", "<image>", "Why?"))]),
  (2, "<image> or <image>?", [("user", parts("<image>", " or ", "<image>", "?"))]),
  (
    1,
    [
      Message("system", "Be brief."),
      Message("user", "A <image>?"),
      Message("assistant", "Yes."),
      Message("user", "B?"),
    ],
    [
      ("system", parts("Be brief.")),
      ("user", parts("A ", "<image>", "?")),
      ("assistant", parts("Yes.")),
      ("user", parts("B?")),
    ],
  ),
)


class TestPrompts:
  @pytest.mark.parametrize(("count", "question", "conversation"), CONVERSATIONS)
  def test_prompts_are_the_template_s(self, tiny, loaded, rows, count, question, conversation):
    messages = [{"role": role, "content": content} for role, content in conversation]
    text = tiny.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    processor, images = loaded.prompts(), rows[2][:count]
    assert processor.prompt(question, count) == text
    example = processor.prepare(images, question)
    assert example.tokens.tolist() == tiny.encode(images, text)
    is_image = example.tokens == tiny.model.config.image_token_id
    assert ((example.image_id >= 0) == is_image).all() and (np.diff(example.image_id[is_image]) >= 0).all()
    tokens = [tiny_tiled.TILE_TOKENS * len(tiny.pixels(image)) for image in images]
    assert np.bincount(example.image_id[is_image]).tolist() == tokens

  def test_a_literal_template(self, tiny, loaded, rows):
    example = loaded.prompts("Look: <image>\\n{question}").prepare(rows[2], "Which?")
    text = "Look: " + f"{tiny.image_token}\n" * 3 + "Which?"
    assert example.tokens.tolist() == tiny.encode(rows[2], text)

  def test_tiles(self, tiny, loaded):
    processor = loaded.prompts()
    for size in SIZES:
      image = noise_image(size, 5)
      example, expected = processor.prepare([image], "Why?"), tiny.pixels(image)
      np.testing.assert_array_equal(example.images.pixels, expected)
      assert processor.image_size([size]) == example.size == (len(expected), len(expected) * tiny_tiled.TILE_TOKENS)
    assert processor.image_size(SIZES[:3]) == processor.prepare([noise_image(s, 1) for s in SIZES[:3]], "Why?").size

  def test_a_limit_of_image_tokens(self, loaded):
    one = tiny_tiled.TILE_TOKENS
    for limit in (one, 2 * one, 3 * one, 5 * one, 6 * one):
      processor = loaded.prompts("chat", limit)
      for size in SIZES:
        example = processor.prepare([noise_image(size, 5)], "Why?")
        assert processor.image_size([size]) == example.size and example.num_image_tokens <= limit
    largest = max(loaded.prompts().image_size([size]).num_tokens for size in SIZES)
    assert max(loaded.prompts("chat", 10 * largest).image_size([size]).num_tokens for size in SIZES) >= largest
    with pytest.raises(UserError, match=f"max_image_tokens={one - 1}: a picture has at least {one} image tokens"):
      loaded.prompts("chat", one - 1)

  def test_views_show_each_picture_as_a_whole_and_in_tiles(self, loaded, rows):
    processor = loaded.prompts()
    example = processor.prepare(rows[2], "Why?")
    views, places = processor.views(example), processor.places(example)
    assert sorted(np.concatenate([view.tokens.ravel() for view in views])) == list(range(example.num_image_tokens))
    view = iter(views)
    for number, image in enumerate(rows[2]):
      whole = next(view)
      assert whole.picture.size == (28, 28) and whole.tokens.shape == (2, 2)
      assert_similar(whole.picture, image.resize((28, 28)))
      count, _ = processor.image_size([image.size])
      if count == 1:
        continue
      tiled = next(view)
      down, across = (side // 2 for side in tiled.tokens.shape)
      assert tiled.picture.size == (28 * across, 28 * down) and down * across == count - 1
      assert_similar(tiled.picture, image.resize(tiled.picture.size))
      for row, column in np.ndindex(tiled.tokens.shape):
        place = [number, row // 2 * across + column // 2, row % 2, column % 2]
        assert places[tiled.tokens[row, column]].tolist() == place
    assert next(view, None) is None and processor.views(processor.prepare([], "Why?")) == []


def assert_similar(picture, expected):
  difference = np.asarray(picture, float) - np.asarray(expected.convert("RGB"), float)
  assert np.abs(difference).mean() < 8


def test_features_and_class_attention(tiny, loaded, rows):
  example = loaded.prompts().prepare(rows[1], "Why?")
  pixels = torch.from_numpy(example.images.pixels)
  features, tower = jax.jit(lambda model, images: model.bind().encode_images(images)[:2])(
    loaded.model, jax.tree.map(lambda x: jnp.asarray(x)[None], example.images)
  )
  with torch.no_grad():
    np.testing.assert_allclose(features[0], tiny.features(pixels), atol=TOLERANCE, rtol=0)
  assert tower.keys.shape[:2] == (1, example.num_image_tokens)
  if loaded.config.vision.has_class_token:
    with torch.no_grad():
      maps = tiny.model.model.vision_tower(pixels, output_attentions=True).attentions[-1].mean(dim=1)[:, 0, 1:]
    expected = maps.reshape(-1, 2, 2, 2, 2).mean(dim=(2, 4)).reshape(-1)
    np.testing.assert_allclose(tower.class_attention[0], expected, atol=1e-6)
  projected = jax.jit(lambda model, x: model.bind().multi_modal_projector(x))(loaded.model, tower.features)
  np.testing.assert_allclose(projected, features, atol=1e-5)


def test_logits_at_every_position(tiny, loaded, rows):
  processor = loaded.prompts()
  examples = [processor.prepare(own, question) for own, question in zip(rows[1:], QUESTIONS[1:], strict=True)]
  buckets = image_buckets({example.size: 1 for example in examples})
  batcher = Batcher(1024, processor.blank, buckets[-1:], buckets=(400,))
  batch = batcher.pack(examples, bucket=batcher.bucket(examples[1]), batch_size=2)
  actual = jax.jit(lambda model, inputs: model.bind()(inputs))(loaded.model, jax.tree.map(jnp.asarray, batch))
  for row, example in zip(actual, examples, strict=True):
    expected = tiny_tiled.logits(tiny, example.tokens, example.images.pixels)
    np.testing.assert_allclose(row[: len(example.tokens)], expected, atol=TOLERANCE, rtol=0)


def reference_answer(tiny, example):
  """The reference's answer to a row with pictures, alone."""
  return reference_himap.generate(
    tiny.model,
    torch.from_numpy(example.tokens).long(),
    tiny.batched(torch.from_numpy(example.images.pixels)),
    prune_layers=SHARES[0],
    keep=tuple(round(share * example.num_image_tokens) for share in SHARES[1]),
    max_new_tokens=NUM_NEW,
  )


@pytest.mark.parametrize("tiny", NAMES, indirect=True, scope="module")
class TestHimap:
  def test_rows_of_no_and_three_pictures_are_the_reference_s(self, tiny, loaded, rows, answers):
    for own, question, found in zip(rows[::2], QUESTIONS[::2], answers, strict=True):
      example = loaded.prompts().prepare(own, question)
      ids = torch.from_numpy(example.tokens).long()
      if not own:
        assert found.kept == [[], []]
        for token in found.token_ids:
          assert token == tiny_tiled.logits(tiny, ids.numpy(), None)[-1].argmax()
          ids = torch.cat([ids, torch.tensor([token])])
        continue
      reference_answer(tiny, example).assert_is(found.token_ids, found.kept, found.first_logits)

  @pytest.mark.sampled
  def test_a_row_alone_on_a_mesh_is_as_with_others_on_one_device(self, tiny, rows, answers, tmp_path):
    opened = checkpoint.open_checkpoint(str(tiny.directory), cache_dir=tmp_path)
    spread = opened.restore(dtype=jnp.float32, mesh=sharding.make_mesh(data=4, tensor=2))
    (alone,) = answer(spread, rows[2:], QUESTIONS[2:], batch_size=4)
    assert (alone.token_ids, alone.kept) == (answers[1].token_ids, answers[1].kept)
    np.testing.assert_allclose(alone.first_logits, answers[1].first_logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("tiny", ["internvl"], indirect=True, scope="module")
def test_rows_padded_to_more_image_tokens(tiny, loaded, rows):
  """In one batch, and even the largest row to more than its own, they keep and answer what each does alone."""
  processor = loaded.prompts()
  examples = [processor.prepare(own, question) for own, question in zip(rows[:0:-1], QUESTIONS[:0:-1], strict=True)]
  tiles = max(example.size.num_tiles for example in examples) + 2
  bucket = Bucket(tiles, tiles * tiny_tiled.TILE_TOKENS, 400, is_ragged=True)
  batcher = Batcher(1024, processor.blank, [ImageBucket(*bucket[:2], is_ragged=True)], buckets=(400,))
  engine = Engine(loaded.model, loaded.schedule("himap", *SHARES), GENERATION)
  found = engine(batcher.pack(examples, bucket=bucket, batch_size=2), range(2))
  for number, example in enumerate(examples):
    kept = [stage[number] for stage in found.kept]
    reference_answer(tiny, example).assert_is(found.tokens[number], kept, found.logits[number])


@pytest.mark.parametrize("tiny", ["internvl"], indirect=True, scope="module")
def test_methods_that_merge_features(loaded, rows):
  """They put merged features through the connector, so that it must act on each image token by itself."""
  schedule, inputs = loaded.schedule("visionzip", keep=(0.5,)), InputConfig("chat", (400,), 1)
  found = generate(loaded, rows[1:2], QUESTIONS[1:2], schedule=schedule, generation=GENERATION, inputs=inputs)
  assert len(found[0].kept[0]) == loaded.prompts().prepare(rows[1], "?").num_image_tokens // 2


def test_converted_and_read_again(tiny, loaded, tmp_path):
  source = convert.open_source(str(tiny.directory))
  target = convert.convert(source, tmp_path / "target", checkpoint.describe, cache_dir=tmp_path)
  again = checkpoint.load(str(target), dtype=jnp.float32, cache_dir=tmp_path)
  assert again.config == loaded.config
  same = jax.tree.map(
    lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()), again.model.params, loaded.model.params
  )
  assert all(jax.tree.leaves(same)) and again.prompts().prompt("Why?") == loaded.prompts().prompt("Why?")


@pytest.mark.parametrize("tiny", ["internvl", "smolvlm"], indirect=True, scope="module")
def test_prompts_without_torch(tiny, tmp_path):
  code = """
import sys
from PIL import Image
from himap_jax import checkpoint
processor = checkpoint.open_checkpoint(sys.argv[1], cache_dir=sys.argv[2]).prompts()
print(processor.prepare([Image.new("RGB", (60, 30))], "Why?").size)
assert "torch" not in sys.modules
"""
  assert commands.Command(code, tiny.directory, tmp_path).succeeded().startswith("ImageSize(num_tiles=")


class TestBadInput:
  def test_more_pictures_than_the_context_holds(self, loaded):
    images = [noise_image((100, 100), 1)] * 80
    with pytest.raises(UserError, match=r"context of 1024 tokens does not hold \d+ image tokens and 6 new ones"):
      answer(loaded, [images], ["Which?"])

  @pytest.mark.parametrize(("count", "question"), [(1, "<image> or <image>?"), (2, "<image>?")])
  def test_another_number_of_tags(self, loaded, rows, count, question):
    with pytest.raises(UserError, match="needs one <image> for each picture"):
      loaded.prompts().prepare(rows[2][:count], question)

  def test_a_template_without_a_place_for_pictures(self, tiny, loaded, rows, tmp_path):
    directory = tiny_tiled.changed(tiny, tmp_path / "other", "config.json")
    (directory / "chat_template.jinja").write_text("{{ messages[0]['content'][-1]['text'] }}")
    processor = checkpoint.open_checkpoint(str(directory), cache_dir=tmp_path).prompts()
    with pytest.raises(UserError, match=f"the prompt has 0 {tiny.image_token} for 1 picture;"):
      processor.prepare(rows[1], "Why?")
    (directory / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    processor = checkpoint.open_checkpoint(str(directory), cache_dir=tmp_path).prompts()
    with pytest.raises(UserError, match=r"cannot hold these messages \(roles must alternate\)") as error:
      processor.prepare(rows[1], "Why?")
    assert isinstance(error.value.__cause__, TemplateError)
    (directory / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template; use a literal --prompt_template"):
      checkpoint.open_checkpoint(str(directory), cache_dir=tmp_path).prompts()

  def test_an_older_template_file(self, tiny, loaded, tmp_path):
    directory = tiny_tiled.changed(tiny, tmp_path / "other", "config.json")
    template = (directory / "chat_template.jinja").read_text()
    (directory / "chat_template.jinja").unlink()
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    processor = checkpoint.open_checkpoint(str(directory), cache_dir=tmp_path).prompts()
    assert processor.prompt("Why?") == loaded.prompts().prompt("Why?")

  def test_without_an_image_processor(self, tiny, tmp_path):
    directory = tiny_tiled.changed(tiny, tmp_path / "other", "config.json")
    (directory / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="cannot load the tokenizer and image processor"):
      checkpoint.open_checkpoint(str(directory), cache_dir=tmp_path)
