"""LLaVA's prompts into tokens and pixels, and examples into batches: templates, where the image stands, buckets, sizes."""

import dataclasses

import numpy as np
import pytest
import tiny_checkpoints
import transformers
from PIL import Image
from transformers import processing_utils

from himap_jax import UserError
from himap_jax.engine.batching import Batcher, Bucket, ImageBucket
from himap_jax.families import FAMILIES
from himap_jax.families.llava import LlavaProcessor
from himap_jax.inputs import IMAGE as IMAGE_KIND
from himap_jax.inputs import PADDING, TEXT, UNUSED_ORDER

BOS, IMAGE = (tiny_checkpoints.SPECIAL_TOKENS.index(token) for token in ("<s>", "<image>"))
NAME = "clip_mha"
N = 16
CONTEXT = 512


@pytest.fixture
def make(loaded):
  """Returns `make(name, image_processor=None, **options)`: a processor, its image processor replaced if one is given."""

  def make(name=NAME, image_processor=None, **options):
    model = loaded(name)
    processor = model.processor
    if image_processor is not None:
      processor = transformers.LlavaProcessor(
        image_processor=image_processor, tokenizer=processor.tokenizer, patch_size=7, chat_template="<image>:"
      )
    return LlavaProcessor(processor, model.config, **options)

  return make


@pytest.fixture
def batcher(loaded):
  """Returns `batcher(buckets=…, max_new_tokens=0)` for the pictures of `NAME`."""
  return lambda **options: Batcher(CONTEXT, loaded(NAME).prompts().blank, [ImageBucket(1, N)], **options)


def text_of(example):
  """Its token ids before and after the image."""
  image = np.flatnonzero(example.image_id == 0)
  assert (example.tokens[image] == IMAGE).all() and (np.diff(image) == 1).all() and len(image) == N
  return tuple(example.tokens[: image[0]].tolist()), tuple(example.tokens[image[-1] + 1 :].tolist())


def ids(text):
  """Token ids of the text's bytes, without a beginning of sequence."""
  tokenizer = tiny_checkpoints.byte_tokenizer()
  return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


class TestTemplates:
  def test_vicuna_is_the_conversation_of_llava(self, make):
    # conv_vicuna_v1 of LLaVA's conversation.py, separator style TWO, with its evaluation's "<image>\n" + question.
    system = (
      "A chat between a curious user and an artificial intelligence assistant. "
      "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    roles, separator = ("USER", "ASSISTANT"), " "
    question = "What is in the {question}?\nAnswer briefly."
    expected = system + separator + roles[0] + ": " + "<image>\n" + question + separator + roles[1] + ":"
    assert make(template="vicuna_v1").prompt(question) == expected

  def test_chat_is_the_checkpoint_s_own(self, make):
    assert make().prompt("Why?") == "<s>USER: <image>\nWhy? ASSISTANT:"

  def test_literal(self, make):
    processor = make(template="{question}\\n<image>:")
    assert processor.prompt("Why <image_?") == "Why <image_?\n<image>:"

  @pytest.mark.parametrize(
    "template, expected",
    [
      ("chat", "<s>USER: Here <image> it is. ASSISTANT:"),
      ("Q <image>\n{question}", "Q Here <image> it is."),
      ("Q <image>{question}", "Q Here <image> it is."),
    ],
  )
  def test_an_image_in_the_question_is_where_it_stands(self, make, template, expected):
    assert make(template=template).prompt("Here <image> it is.") == expected

  def test_vicuna_with_an_image_in_the_question(self, make):
    prompt = make(template="vicuna_v1").prompt("Here <image> it is.")
    assert prompt.endswith("questions. USER: Here <image> it is. ASSISTANT:")

  @pytest.mark.parametrize(
    "template", ["", "{question}", "<image>", "<image><image>{question}", "<image> {q}", "vicuna"]
  )
  def test_literals_that_cannot_be(self, make, template):
    with pytest.raises(ValueError, match="must be vicuna_v1, chat, or a text with one <image>"):
      make(template=template)

  def test_transformers_has_nothing_to_warn_of(self, make, monkeypatch):
    monkeypatch.setattr(processing_utils.logger, "warning", pytest.fail)
    assert "Why?" in make().prompt("Why?")

  def test_the_default_of_several_chat_templates(self, loaded):
    processor = transformers.LlavaProcessor(
      image_processor=loaded(NAME).processor.image_processor, tokenizer=tiny_checkpoints.byte_tokenizer(), patch_size=7
    )
    processor.chat_template = {"short": "", "default": "Q: {{ messages[0]['content'][-1]['text'] }}"}
    assert LlavaProcessor(processor, loaded(NAME).config).prompt("Why?") == "Q: Why?"

  def test_no_chat_template(self, loaded):
    model = loaded(NAME)
    bare = transformers.LlavaProcessor(
      image_processor=model.processor.image_processor, tokenizer=tiny_checkpoints.byte_tokenizer(), patch_size=7
    )
    with pytest.raises(ValueError, match="no chat template; use --prompt_template=vicuna_v1"):
      LlavaProcessor(bare, model.config)
    assert LlavaProcessor(bare, model.config, template="vicuna_v1").num_image_tokens == N


class TestPrepare:
  @pytest.mark.parametrize(
    "template", ["chat", "USER: <image>\n{question} ASSISTANT:", "<s>USER: <image>\n{question} ASSISTANT:"]
  )
  def test_one_beginning_of_sequence(self, make, images, template):
    example = make(template=template).prepare([images[0]], "Why?")
    before, after = text_of(example)
    assert before == (BOS, *ids("USER: "))
    assert after == ids("\nWhy? ASSISTANT:")
    assert example.num_text_tokens == len(before) + len(after)
    assert example.positions.tolist() == list(range(len(before) + N + len(after)))

  def test_image_before_the_last_word(self, make, images):
    example = make(template="<image>{question}").prepare([images[0]], "Why? <image>:")
    assert text_of(example) == ((BOS, *ids("Why? ")), ids(":"))

  def test_nothing_after_the_image(self, make, images):
    with pytest.raises(ValueError, match="needs text after <image>"):
      make(template="<image>{question}").prepare([images[0]], "Why? <image>")
    with pytest.raises(ValueError, match="needs text after <image>"):
      make(template="{question}<image>").prepare([images[0]], "Why?")

  def test_two_images(self, make, images):
    for template in ("chat", "vicuna_v1", "<image>{question}"):
      with pytest.raises(ValueError, match="one <image> for each picture, but this one has 2 for 1 picture"):
        make(template=template).prepare([images[0]], "<image> or <image>?")

  def test_pixels_are_transformers_own(self, make, checkpoints, images):
    tiny = checkpoints(NAME)
    for image in images:
      _, expected = tiny.encode(image, "<image>")
      np.testing.assert_array_equal(make().prepare([image], "?").images.pixels, expected.numpy())

  def test_longest_prompt(self, make, batcher, images):
    processor, batches = make(template="<image>{question}"), batcher(buckets=(8, 64, 10_000), max_new_tokens=10)
    longest = CONTEXT - N - 10
    assert batches.buckets == tuple(Bucket(1, N, text) for text in (8, 64, 128, 256, longest))
    example = processor.prepare([images[0]], "?" * (longest - 1))
    assert (example.num_text_tokens, batches.bucket(example)) == (longest, Bucket(1, N, longest))
    with pytest.raises(ValueError, match=f"has {longest + 1} text tokens; with 16 image .* room for {longest}"):
      batches.bucket(processor.prepare([images[0]], "?" * longest))


class TestSizes:
  @pytest.mark.parametrize("size", [(1, 100_000), (100_000, 1), (3, 601)])
  def test_long_and_narrow(self, make, size):
    image = Image.new("RGB", size)
    with pytest.raises(ValueError, match=f"has {size[0]} x {size[1]} pixels; one side may be at most 200 times"):
      make().prepare([image], "?")

  @pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
  def test_without_pixels(self, make, size):
    with pytest.raises(UserError, match=f"the picture is empty: it has {size[0]} x {size[1]} pixels"):
      make().prepare([Image.new("RGB", size)], "?")

  @pytest.mark.parametrize("size", [(1, 1), (3, 600), (1, 200), (2000, 1000)])
  def test_other_sizes(self, make, size):
    example = make().prepare([Image.new("RGB", size, "red")], "?")
    assert example.images.pixels.shape == (1, 3, 28, 28)
    assert np.isfinite(example.images.pixels).all()

  def test_padded_to_a_square(self, make):
    sizes = dict(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = make(image_processor=transformers.LlavaImageProcessorPil(do_pad=True, **sizes))
    assert processor.prepare([Image.new("RGB", (30, 300))], "?").images.pixels.shape == (1, 3, 28, 28)
    with pytest.raises(ValueError, match="has 100 x 14000 pixels; padded to a square it is above the limit"):
      processor.prepare([Image.new("RGB", (100, 14_000))], "?")

  @pytest.mark.parametrize("size", [(40, 25), (25, 40), (30, 30)])
  def test_with_square_pictures(self, loaded, size):
    """As LLaVA's `expand2square`: the picture in the middle of a square of its processor's mean colour."""
    opened, picture = loaded(NAME), tiny_checkpoints.noise_image(size, seed=3)
    mean = tuple(int(value * 255) for value in opened.processor.image_processor.image_mean)
    square = Image.new("RGB", (max(size),) * 2, mean)
    square.paste(picture, tuple((max(size) - side) // 2 for side in size))
    expected = opened.prompts().prepare([square], "?").images.pixels
    padded = opened.with_aspect_ratio("pad")
    np.testing.assert_allclose(padded.prompts().prepare([picture], "?").images.pixels, expected, atol=1e-5)
    assert not getattr(opened.processor.image_processor, "do_pad", False)

  def test_a_family_whose_pictures_are_not_padded(self, loaded):
    opened = dataclasses.replace(loaded(NAME), family=FAMILIES["gemma3"])
    with pytest.raises(UserError, match="pictures of gemma3 are not padded to squares"):
      opened.with_aspect_ratio("pad")

  def test_pictures_of_different_sizes(self, make):
    image_processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, do_center_crop=False)
    with pytest.raises(ValueError, match="pictures of different sizes"):
      make(image_processor=image_processor)

  @pytest.mark.parametrize("name, grid, num_image_tokens", [("siglip", (5, 5), 25), ("clip_gqa_tied", (4, 4), 17)])
  def test_grid(self, make, name, grid, num_image_tokens):
    processor = make(name)
    assert (processor.patch_grid, processor.num_image_tokens) == (grid, num_image_tokens)

  @pytest.mark.parametrize("name", [NAME, "dinov2"])
  def test_the_picture_is_what_the_model_sees(self, make, name):
    processor = make(name)
    height, width = processor.image_shape
    image = tiny_checkpoints.noise_image((width, height), seed=3)
    ((picture, _),) = processor.views(processor.prepare([image], "?"))
    np.testing.assert_allclose(np.asarray(picture, int), np.asarray(image, int), atol=1)

  def test_the_picture_ends_with_the_last_patch(self, make):
    sizes = dict(size={"height": 31, "width": 31}, crop_size={"height": 31, "width": 31})
    processor = make(image_processor=transformers.CLIPImageProcessorPil(**sizes))
    image = tiny_checkpoints.noise_image((31, 31), seed=3)
    ((picture, _),) = processor.views(processor.prepare([image], "?"))
    assert processor.patch_grid == (4, 4)
    np.testing.assert_allclose(np.asarray(picture, int), np.asarray(image, int)[:28, :28], atol=1)


class TestBatches:
  @pytest.mark.parametrize("buckets", [(), (0, 8), (-1,), (8, 8), (64, 8)])
  def test_buckets_that_cannot_be(self, batcher, buckets):
    with pytest.raises(ValueError, match="buckets must be positive and ascending"):
      batcher(buckets=buckets)

  def test_a_context_that_holds_no_prompt(self, batcher):
    batcher(max_new_tokens=CONTEXT - N - 1)
    with pytest.raises(ValueError, match="context of 512 tokens does not hold 16 image tokens and 496 new"):
      batcher(max_new_tokens=CONTEXT - N)

  def test_smallest_bucket_that_fits(self, make, batcher, images):
    processor, batches = make(template="<image>{question}"), batcher(buckets=(4, 8))
    for length, bucket in ((3, 4), (4, 8), (7, 8), (8, 16), (256, CONTEXT - N)):
      assert batches.bucket(processor.prepare([images[0]], "?" * length)) == Bucket(1, N, bucket)

  def test_what_a_batch_holds(self, make, batcher, images):
    processor = make(template="<image>{question}")
    examples = [processor.prepare([images[0]], "ab<image>c"), processor.prepare([images[1]], "<image>d")]
    batch = batcher(buckets=(8,)).pack(examples, bucket=Bucket(1, N, 8), batch_size=4)
    assert batch.tokens.shape == (4, 8 + N)
    assert batch.images.pixels.shape == (4, 1, 3, 28, 28)
    text, image, padding = TEXT, [IMAGE_KIND] * N, PADDING
    assert batch.layout.kind[0].tolist() == [text] * 3 + image + [text] + [padding] * 4
    assert batch.layout.kind[1:].tolist() == [[text] + image + [text] + [padding] * 6] * 3
    assert batch.layout.num_image_tokens == N
    assert batch.layout.image_token[0].tolist() == [-1] * 3 + list(range(N)) + [-1] * 5
    assert batch.layout.image_id[0].tolist() == [-1] * 3 + [0] * N + [-1] * 5
    assert batch.layout.order[0].tolist() == [*range(4 + N), *[UNUSED_ORDER] * 4]
    assert batch.positions[0].tolist() == [*range(4 + N), 0, 0, 0, 0]
    assert batch.tokens[0].tolist() == [BOS, *ids("ab"), *[IMAGE] * N, *ids("c"), 0, 0, 0, 0]
    np.testing.assert_array_equal(batch.tokens[1:], [[BOS, *[IMAGE] * N, *ids("d"), *[0] * 6]] * 3)
    np.testing.assert_array_equal(batch.images.pixels[3], examples[1].images.pixels)

  def test_decoding_leaves_out_special_tokens(self, make):
    assert make().decode([BOS, *ids(" yes\n"), 1]) == "yes"
    assert make().decode([]) == ""
