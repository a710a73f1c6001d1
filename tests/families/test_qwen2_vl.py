"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL against transformers: pixels, prompts, positions, features, logits, tokens, HiMAP."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoints
import tiny_qwen2_vl
import torch

from himap_jax import GenerationConfig, InputConfig, checkpoint, generate
from himap_jax.engine import sharding
from himap_jax.engine.batching import Batcher, Bucket, ImageBucket

TOLERANCE = 1e-4
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
# No picture, one, two between words, and three.
QUESTIONS = ("What?", "Where is the dog?", "Is <image> the same as <image> here?", "<image><image> or <image>, which?")
NUM_NEW, TEXT = 6, 160
GENERATION = GenerationConfig(NUM_NEW, ignore_eos=True)
INPUTS = InputConfig("chat", (TEXT,), batch_size=4)
SHARES = ((1, 2), (0.5, 0.25))  # the second before the layer whose output gets the third of Qwen3-VL's injections


@pytest.fixture(scope="module", params=tiny_qwen2_vl.SPECS)
def tiny(request, tmp_path_factory):
  return tiny_qwen2_vl.make(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def loaded(tiny, tmp_path_factory):
  """On a mesh of eight devices."""
  mesh, cache_dir = sharding.make_mesh(data=4, tensor=2), tmp_path_factory.mktemp("cache")
  return checkpoint.load(str(tiny.directory), dtype=jnp.float32, cache_dir=cache_dir, mesh=mesh)


@pytest.fixture(scope="module")
def rows(images):
  """The pictures of each question."""
  return [[], images[1:2], images[2:4], [images[3], images[1], images[0]]]


@pytest.fixture(scope="module")
def encoded(tiny, rows):
  return [tiny.encode(own, chat(text, len(own))) for own, text in zip(rows, QUESTIONS, strict=True)]


def chat(text, num_pictures):
  text = text.replace("<image>", PICTURE) if "<image>" in text else PICTURE * num_pictures + text
  system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
  return f"{system}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def positions_of(tiny, inputs):
  """transformers' own rotary positions, `[3, S]`."""
  known = {name: inputs[name] for name in ("input_ids", "mm_token_type_ids")}
  return tiny.model.model.get_rope_index(**known, image_grid_thw=inputs.get("image_grid_thw"))[0][:, 0]


def test_prompts_pixels_and_positions(tiny, loaded, rows, encoded):
  processor = loaded.prompts()
  for own, question, expected in zip(rows, QUESTIONS, encoded, strict=True):
    assert processor.prompt(question, len(own)) == chat(question, len(own))
    example = processor.prepare(own, question)
    assert example.tokens.tolist() == expected["input_ids"][0].tolist()
    assert example.positions.T.tolist() == positions_of(tiny, expected).tolist()
    assert processor.image_size([image.size for image in own]) == example.size
    if own:
      frames = expected["pixel_values"].reshape(len(example.images.pixels), 3, 2, -1)
      for frame in (0, 1):
        np.testing.assert_array_equal(example.images.pixels, frames[:, :, frame].flatten(1))


def test_image_size_is_that_of_the_prepared_picture(loaded):
  processor = loaded.prompts("<image>{question}")
  for seed, size in enumerate([(8, 8), (5, 9), (200, 30), (31, 33), (90, 91), (3, 300), (57, 12), (16, 100), (44, 44)]):
    example = processor.prepare([tiny_checkpoints.noise_image(size, seed)], "?")
    assert processor.image_size([size]) == example.size


def test_views_and_places(loaded, rows):
  processor = loaded.prompts()
  example = processor.prepare(rows[3], "Which?")
  views, places = processor.views(example), processor.places(example)
  assert [view.picture.size for view in views] == [(32, 32), (48, 24), (32, 32)]
  assert [view.tokens.shape for view in views] == [(4, 4), (3, 6), (4, 4)]
  assert np.concatenate([view.tokens.ravel() for view in views]).tolist() == list(range(example.num_image_tokens))
  assert places[16 + 7].tolist() == [1, 0, 1, 1]
  resized = np.asarray(rows[3][0].resize((32, 32), 3), np.int32)
  assert np.abs(resized - np.asarray(views[0].picture, np.int32)).max() <= 1


def test_features_and_logits_at_every_position(tiny, loaded, rows, encoded):
  """In one padded batch."""
  processor = loaded.prompts()
  examples = [processor.prepare(own, text) for own, text in zip(rows, QUESTIONS, strict=True)]
  patches, tokens = (max(example.size[axis] for example in examples) for axis in (0, 1))
  bucket = Bucket(patches + 8, tokens + 2, TEXT, True)
  batcher = Batcher(512, processor.blank, [ImageBucket(*bucket[:2], True)], buckets=(TEXT,))
  batch = jax.tree.map(jnp.asarray, batcher.pack(examples, bucket=bucket, batch_size=4))
  run = jax.jit(lambda model, inputs: (model.bind().encode_images(inputs.images)[0], model.bind()(inputs)))
  features, logits = run(loaded.model, batch)
  assert np.isfinite(features).all() and np.isfinite(logits).all()
  for row, inputs in enumerate(encoded):
    with torch.no_grad():
      expected = tiny.model(**inputs).logits[0]
      np.testing.assert_allclose(logits[row, : len(expected)], expected, atol=TOLERANCE, rtol=0)
      if "pixel_values" in inputs:
        expected = tiny.model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
        expected = torch.cat(list(expected))
        np.testing.assert_allclose(features[row, : len(expected)], expected, atol=TOLERANCE, rtol=0)


def test_greedy_tokens(tiny, loaded, rows, encoded):
  answers = generate(loaded, rows[1:2], QUESTIONS[1:2], generation=GENERATION, inputs=INPUTS)
  prompt = encoded[1]["input_ids"].shape[1]
  options = dict(max_new_tokens=NUM_NEW, min_new_tokens=NUM_NEW, do_sample=False)
  expected = tiny.model.generate(**encoded[1], **options)[0, prompt:]
  assert answers[0].token_ids == expected.tolist()
  assert loaded.eos_token_ids == (2, 0)


def test_himap_is_the_slow_one(tiny, loaded, rows, encoded):
  """Rows of no, one, two and three pictures in one call, each as alone."""
  schedule = loaded.schedule("himap", *SHARES)
  answers = generate(loaded, rows, QUESTIONS, schedule=schedule, generation=GENERATION, inputs=INPUTS)
  for inputs, answer in zip(encoded, answers, strict=True):
    for number, token in enumerate(answer.token_ids):  # decoding is running the pruned sequence again
      kept, logits = slow_himap(tiny, inputs, answer.token_ids[:number])
      assert token == logits.argmax()
      if not number:
        assert answer.kept == kept
        np.testing.assert_allclose(answer.first_logits, logits, atol=TOLERANCE, rtol=0)


def test_before_the_decoder_positions_stay(tiny, loaded, rows, encoded):
  """A stage before layer 0 keeps the positions of the tokens along all axes."""
  schedule = loaded.schedule("divprune", (0,), (0.5,))
  answers = generate(loaded, rows[1:2], QUESTIONS[1:2], schedule=schedule, generation=GENERATION, inputs=INPUTS)
  _, logits = slow_himap(tiny, encoded[1], [], given=answers[0].kept[0])
  np.testing.assert_allclose(answers[0].first_logits, logits, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def slow_himap(tiny, inputs, answered, given=None):
  """HiMAP with transformers' layers on one prompt and the tokens answered so far, or with image tokens `given`.

  Gives the kept image tokens after each stage, and the last token's logits.
  """
  model, num_prompt = tiny.model.model, inputs["input_ids"].shape[1]
  answered = torch.tensor([answered], dtype=torch.long)
  ids = torch.cat([inputs["input_ids"], answered], dim=1)
  types = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(answered)], dim=1)
  rotary = positions_of(tiny, inputs | {"input_ids": ids, "mm_token_type_ids": types})
  x, order, image, deep = model.get_input_embeddings()(ids), torch.arange(ids.shape[1]), torch.tensor([]), []
  if "pixel_values" in inputs:
    features = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    image = (types[0] == 1).nonzero()[:, 0]
    x[0, image] = torch.cat(list(features.pooler_output))
    deep = [torch.cat(list(own)) for own in getattr(features, "deepstack_features", None) or []]
  whole, kept, attention = image, [], None
  stages = dict(zip(*SHARES, strict=True)) if given is None else {0: None}
  for index, layer in enumerate(model.language_model.layers):
    if index in stages and len(whole):
      is_image = torch.isin(order, image)
      if given is None:
        after = (order > image.max()) & (order < num_prompt)
        scores = attention[0].mean(dim=0)[after if index == SHARES[0][0] else is_image].sum(dim=0)[is_image]
        count = max(1, round(stages[index] * len(whole)))
        image = image[scores.argsort(descending=True, stable=True)[:count].sort().values]
      else:
        image = whole[given]
      kept.append(torch.searchsorted(whole, image).tolist())
      remains = ~is_image | torch.isin(order, image)
      x, order = x[:, remains], order[remains]
    elif index in stages:
      kept.append([])
    rotation = model.language_model.rotary_emb(x, rotary[:, None, order])
    mask = torch.full((x.shape[1],) * 2, float("-inf")).triu(1)[None, None]
    y, attention = layer.self_attn(layer.input_layernorm(x), position_embeddings=rotation, attention_mask=mask)
    x = x + y
    x = x + layer.mlp(layer.post_attention_layernorm(x))
    if index < len(deep):
      x[0, torch.isin(order, image)] += deep[index][torch.searchsorted(whole, image)]
  return kept, tiny.model.lm_head(model.language_model.norm(x))[0, -1]
