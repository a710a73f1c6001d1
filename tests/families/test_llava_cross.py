"""LLaVA with a decoder that reads pictures by cross-attention, against transformers' parts put together, in float32."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_cross

from himap_jax import GenerationConfig, InputConfig, UserError, checkpoint, generate
from himap_jax.engine.batching import Batcher, Bucket, ImageBucket
from himap_jax.families import from_hf

PROMPT = "<s>USER: <image>\n{question} ASSISTANT:"
QUESTIONS = ("What is it?", "And what of <image> then?")
N, NUM_NEW, TOLERANCE = 25, 6, 1e-4


@pytest.fixture(scope="module")
def tiny(checkpoints, tmp_path_factory):
  return tiny_cross.make(checkpoints("dinov2"), tmp_path_factory.mktemp("llava_cross"))


@pytest.fixture(scope="module")
def loaded(tiny, tmp_path_factory):
  return checkpoint.load(str(tiny.directory), dtype=jnp.float32, cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def examples(loaded, images):
  return [loaded.prompts(PROMPT).prepare([own], text) for own, text in zip(images, QUESTIONS, strict=False)]


def text_of(example):
  return example.tokens[example.image_id < 0].tolist()


def test_prompts_hold_the_image_token_as_text(tiny, examples, images):
  ids, pixels = tiny.llava.encode(images[0], PROMPT.replace("{question}", QUESTIONS[0]))
  ids = ids.tolist()
  first = ids.index(tiny.llava.model.config.image_token_id)
  assert text_of(examples[0]) == ids[: first + 1] + ids[first + N :]
  np.testing.assert_allclose(examples[0].images.pixels, pixels, atol=1e-5)
  is_text = examples[0].image_id < 0
  assert examples[0].positions[is_text].tolist() == list(range(is_text.sum()))
  assert examples[0].num_image_tokens == N


def test_logits_at_every_position(tiny, loaded, examples):
  batcher = Batcher(512, loaded.prompts(PROMPT).blank, [ImageBucket(1, N)])
  batch = jax.tree.map(jnp.asarray, batcher.pack(examples, bucket=Bucket(1, N, 80), batch_size=2))
  logits = jax.jit(lambda model, inputs: model.bind()(inputs))(loaded.model, batch)
  for own, example in zip(np.asarray(logits), examples, strict=True):
    expected = tiny.logits(text_of(example), example.images.pixels)
    is_text = example.image_id < 0
    np.testing.assert_allclose(own[: len(is_text)][is_text], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("method", ["none", "divprune"])
def test_greedy_tokens(tiny, loaded, examples, images, method):
  schedule = loaded.schedule(method, *([(0,), (7,)] if method != "none" else []))
  inputs, generation = InputConfig(PROMPT, (80,), 2), GenerationConfig(NUM_NEW, ignore_eos=True)
  pictures = [[own] for own in images[:2]]
  answers = generate(loaded, pictures, QUESTIONS, schedule=schedule, generation=generation, inputs=inputs)
  for example, answer in zip(examples, answers, strict=True):
    kept = answer.kept[0] if method != "none" else None
    assert kept is None or len(kept) == 7
    ids = text_of(example) + answer.token_ids[:-1]
    logits = tiny.logits(ids, example.images.pixels, kept)
    assert logits[-NUM_NEW:].argmax(dim=-1).tolist() == answer.token_ids


def test_unusable_cross_layers_are_refused(tiny):
  fields = json.loads((tiny.directory / "config.json").read_text())
  for layers, message in (([1, 5], "some of the decoder's layers 0 to 4"), ("all", "must be a list of layers")):
    with pytest.raises(UserError, match=message):
      from_hf(fields | {"text_config": fields["text_config"] | {"cross_attention_layers": layers}})


def test_another_language_model_is_refused(tiny):
  fields = json.loads((tiny.directory / "config.json").read_text())
  with pytest.raises(UserError, match="language model 'llama' is not supported; supported: mllama_text_model$"):
    from_hf(fields | {"text_config": fields["text_config"] | {"model_type": "llama"}})
