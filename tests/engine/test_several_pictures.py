"""Prompts with several pictures, in batches with others, against transformers and the slow reference, float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_himap
import torch

from himap_jax import GenerationConfig, InputConfig, UserError, generate
from himap_jax.engine.batching import Batcher, Bucket, ImageBucket
from himap_jax.engine.engine import Engine
from himap_jax.engine.prefill import prefill
from himap_jax.engine.programs import method_parameters
from himap_jax.families.family import Message
from himap_jax.generation import make_batcher
from himap_jax.inputs import Example, Images, ImageSize

NAME = "clip_mha"
N = 16
QUESTIONS = (
  "<image>Is it the same as <image> ?",
  "One picture: <image> what?",
  "<image><image> or <image>, which is it?",
  "A longer text before <image>\nand between <image> and a question after it.",
)
SHARES = ((2, 4), (0.5, 0.125))
NUM_NEW = 6


@pytest.fixture(scope="module")
def pictures(images):
  """The pictures of each question."""
  return [[images[(row + place) % 4] for place in range(text.count("<image>"))] for row, text in enumerate(QUESTIONS)]


@pytest.fixture(scope="module")
def encoded(checkpoints, pictures):
  return [checkpoints(NAME).encode(own, "<s>" + text) for own, text in zip(pictures, QUESTIONS, strict=True)]


def examples_of(model, pictures):
  processor = model.prompts("<image>{question}")
  return [processor.prepare(own, text) for own, text in zip(pictures, QUESTIONS, strict=True)]


def answer(loaded, pictures, questions, schedule):
  generation = GenerationConfig(NUM_NEW, ignore_eos=True)
  inputs = InputConfig("<image>{question}", (80,), batch_size=2)
  return generate(loaded, pictures, questions, schedule=schedule, generation=generation, inputs=inputs)


def packed(model, examples, num_pictures=3):
  """A batch of rows, padded to the image tokens of `num_pictures`."""
  bucket = Bucket(num_pictures, num_pictures * N, 80, any(example.num_images < num_pictures for example in examples))
  batcher = Batcher(512, model.prompts().blank, [ImageBucket(num_pictures, num_pictures * N)], buckets=(80,))
  return jax.tree.map(jnp.asarray, batcher.pack(examples, bucket=bucket, batch_size=len(examples)))


def test_logits_at_every_position(checkpoints, loaded, pictures, encoded):
  tiny, model = checkpoints(NAME), loaded(NAME)
  examples = examples_of(model, pictures)
  batch = packed(model, examples)
  actual = jax.jit(lambda model, inputs: model.bind()(inputs))(model.model, batch)
  for own, example, logits, (ids, pixels) in zip(pictures, examples, actual, encoded, strict=True):
    assert example.tokens.tolist() == ids.tolist()
    assert np.unique(example.image_id, return_counts=True)[1][1:].tolist() == [N] * len(own)
    with torch.no_grad():
      expected = tiny.model(input_ids=ids[None], pixel_values=pixels).logits[0]
    np.testing.assert_allclose(logits[: len(ids)], expected, atol=1e-4, rtol=0)


def test_shares_are_of_each_row_s_own_tokens(checkpoints, loaded, pictures, encoded):
  """Kept sets, logits and tokens of rows of one, two and three pictures in one call are those of the reference."""
  tiny, model = checkpoints(NAME), loaded(NAME)
  answers = answer(model, pictures, QUESTIONS, model.schedule("himap", *SHARES))
  for own, row, found in zip(pictures, encoded, answers, strict=True):
    keep = tuple(round(share * len(own) * N) for share in SHARES[1])
    expected = reference_himap.generate(tiny.model, *row, prune_layers=SHARES[0], keep=keep, max_new_tokens=NUM_NEW)
    expected.assert_is(found.token_ids, found.kept, found.first_logits)


def test_a_count_above_a_row_s_tokens_keeps_all(loaded, pictures):
  model = loaded(NAME)
  answers = answer(model, pictures[:2], QUESTIONS[:2], model.schedule("himap", (2, 4), (20, 3)))
  assert [list(map(len, found.kept)) for found in answers] == [[20, 3], [16, 3]]
  with pytest.raises(UserError, match="cannot keep 49 image tokens before layer 2: there are 48"):
    answer(model, pictures, QUESTIONS, model.schedule("himap", (2, 4), (49, 3)))


def test_a_row_is_as_alone(loaded, pictures):
  model, rows = loaded(NAME), (0, 1, 3)  # two of two pictures, which share a batch, and one of one
  schedule = model.schedule("visionzip")
  pictures, questions = ([own[row] for row in rows] for own in (pictures, QUESTIONS))
  together = answer(model, pictures, questions, schedule)
  for own, question, found in zip(pictures, questions, together, strict=True):
    (alone,) = answer(model, [own], [question], schedule)
    assert (alone.kept, alone.token_ids) == (found.kept, found.token_ids)
    assert all(0 <= index < len(own) * N for stage in found.kept for index in stage)


def test_rows_padded_to_more_image_tokens(loaded, pictures):
  """Rows of one to three pictures in one batch keep and answer what each does alone, their shares included."""
  model = loaded(NAME)
  schedule = model.schedule("himap", *SHARES, restore=True)
  expected = answer(model, pictures, QUESTIONS, schedule)
  batch = packed(model, examples_of(model, pictures))
  result = Engine(model.model, schedule, GenerationConfig(NUM_NEW, ignore_eos=True))(batch, range(4))
  for row, alone in enumerate(expected):
    assert [stage[row] for stage in result.kept] == alone.kept and result.tokens[row] == alone.token_ids
    np.testing.assert_allclose(result.logits[row], alone.first_logits, atol=1e-4, rtol=0)


@pytest.mark.sampled
@pytest.mark.parametrize("method", ["sparsevlm", "divprune", "cdpruner"])
def test_methods_on_rows_padded_to_more_image_tokens(method, loaded, pictures):
  """Their prefill; decoding is the same after all methods."""
  model = loaded(NAME)
  schedule = model.schedule(method, (2, 3, 4) if method == "sparsevlm" else None)
  assert schedule.is_ranking
  examples, keys = examples_of(model, pictures), jax.random.split(jax.random.key(0), len(pictures))
  run = jax.jit(lambda model, inputs, keys: prefill(model.bind(), inputs, keys, schedule, method_parameters(schedule)))
  together = run(model.model, packed(model, examples), keys)
  for rows, num_pictures in (([0, 3], 2), ([1], 1)):
    alone = run(model.model, packed(model, [examples[row] for row in rows], num_pictures), keys[jnp.array(rows)])
    for place, row in enumerate(rows):
      for padded, own in zip(together.kept, alone.kept, strict=True):
        assert [index for index in padded[row].tolist() if index >= 0] == own[place].tolist()
      np.testing.assert_allclose(together.logits[row], alone.logits[place], atol=1e-4, rtol=0)


def test_other_methods_have_batches_of_equal_rows(loaded):
  model = loaded(NAME)
  for method in ("dart", "visionzip", "vispruner", "prumerge", "fsr", "visiontrim", "uniform", "himap_adaptive"):
    schedule = model.schedule(method, (2, 4) if method == "himap_adaptive" else None)
    assert not schedule.is_ranking


@pytest.mark.sampled
@pytest.mark.parametrize("method", ["divprune", "shortv"])
def test_rows_without_pictures(method, checkpoints, loaded):
  tiny, model = checkpoints(NAME), loaded(NAME)
  schedule = model.schedule(method, (1, 3) if method == "shortv" else None)
  questions = ("Why?", "Where is it?")
  answers = answer(model, [[], []], questions, schedule)
  for text, found in zip(questions, answers, strict=True):
    ids = tiny.processor.tokenizer(f"<s>{text}", return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
      expected = tiny.model.generate(input_ids=ids, max_new_tokens=NUM_NEW, min_new_tokens=NUM_NEW, do_sample=False)
    assert found.token_ids == expected[0, ids.shape[1] :].tolist()
    assert found.kept == [[] for _ in schedule.stages]


def test_conversations(checkpoints, loaded, images):
  """The chat template's own text, as of transformers; pictures that a question places stand there."""
  processor = loaded(NAME).prompts("chat")
  messages = [Message("user", "Is <image> it?"), Message("assistant", "No."), Message("user", "<image>And?")]
  picture, said = {"type": "image"}, [{"type": "text", "text": text} for text in ("Is ", " it?", "No.", "And?")]
  conversation = [
    {"role": "user", "content": [said[0], picture, said[1]]},
    {"role": "assistant", "content": [said[2]]},
    {"role": "user", "content": [picture, said[3]]},
  ]
  expected = checkpoints(NAME).processor.apply_chat_template(conversation, add_generation_prompt=True)
  assert expected == "<s>USER: Is <image>\n it? ASSISTANT: No. USER: <image>\nAnd? ASSISTANT:"
  assert processor.prompt(messages, 2) == expected
  assert processor.prompt("Is <image> or <image> it?", 2) == "<s>USER: Is <image> or <image> it? ASSISTANT:"
  ids, _ = checkpoints(NAME).encode(images[:2], expected)
  assert processor.prepare(images[:2], messages).tokens.tolist() == ids.tolist()
  first = [Message("system", "Be brief."), Message("user", "Same?")]
  assert processor.prompt(first, 2) == "<s>SYSTEM: Be brief. USER: <image>\n<image>\nSame? ASSISTANT:"
  with pytest.raises(
    UserError, match="a conversation of several messages needs a chat template: --prompt_template=chat"
  ):
    loaded(NAME).prompts("vicuna_v1").prepare(images[:2], messages)
  with pytest.raises(UserError, match="this one has 2 for 1 picture"):
    processor.prepare(images[:1], messages)


class TestBadPrompts:
  @pytest.mark.parametrize(
    ("count", "question", "message"),
    [
      (2, "<image>Why?", "one <image> for each picture, but this one has 1 for 2 pictures"),
      (1, "<image><image>Why?", "but this one has 2 for 1 picture"),
      (2, "<image>Why? <image>", "needs text after <image>"),
    ],
  )
  def test_image_tags(self, count, question, message, loaded, images):
    with pytest.raises(UserError, match=message):
      loaded(NAME).prompts("<image>{question}").prepare(images[:count], question)

  def test_without_tags_all_pictures_stand_where_the_template_has_its_own(self, loaded, images):
    for template, expected in (
      ("chat", "<s>USER: <image>\n<image>\nWhy? ASSISTANT:"),
      ("Look: <image>{question}", "Look: <image><image>Why?"),
      ("<image>\\n{question}", "<image>\n<image>\nWhy?"),
    ):
      processor = loaded(NAME).prompts(template)
      assert processor.prompt("Why?", 2) == expected
      assert processor.prepare(images[:2], "Why?").num_image_tokens == 2 * N

  def test_more_than_the_context_holds(self, loaded):
    sizes = [ImageBucket(n, n * N) for n in (1, 2, 40)]
    batcher = Batcher(512, loaded(NAME).prompts().blank, sizes, buckets=(8,), max_new_tokens=2)
    assert batcher.buckets == tuple(
      Bucket(n, n * N, text) for n, longest in ((1, 494), (2, 478)) for text in (8, 16, 32, 64, 128, 256, longest)
    )
    blank = batcher.pack([], bucket=Bucket(2, 32, 8), batch_size=1)
    assert blank.images.pixels.shape == (1, 2, 3, 28, 28) and batcher.most_image_tokens == 32
    with pytest.raises(UserError, match="context of 512 tokens does not hold 640 image tokens and 2 new ones"):
      batcher.bucket(tiny_example(40))

  def test_a_row_beyond_the_context_changes_no_other_row(self, loaded):
    model, rare = loaded(NAME), {ImageSize(n, n * N): 1 for n in (3, 40)}
    sizes = {ImageSize(1, N): 1000} | rare
    batcher = make_batcher(model, model.prompts(), sizes, (8,), 2, model.schedule("himap", *SHARES))
    assert batcher.bucket(tiny_example(3)) == Bucket(3, 3 * N, 8)
    with pytest.raises(UserError, match="does not hold 640 image tokens"):
      batcher.bucket(tiny_example(40))


def tiny_example(num_pictures):
  image_id = np.append(np.repeat(np.arange(num_pictures), N), -1).astype(np.int32)
  slots = np.arange(len(image_id), dtype=np.int32)
  return Example(slots, image_id, slots, Images(np.zeros((num_pictures, 3, 28, 28), np.float32)))
