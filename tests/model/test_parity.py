"""The unpruned model against transformers, float32: image features, logits at every position, greedy tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoints
import torch

from himap_jax import GenerationConfig, InputConfig, generate
from himap_jax.inputs import Images

PROMPTS = (
  "<s>USER: <image>\nWhat is it? ASSISTANT:",
  "<image>Where?",
  "<s>A longer text stands before the image here. <image> So what?",
  "<s>USER: <image>\nAnd a question that is a good deal longer than the other three. ASSISTANT:",
)
TOLERANCE = 1e-4  # logits reach 14; in float32 transformers and we are each up to 0.5e-4 from float64
TOWERS = ("dinov2_shrunk", "internvit_small")  # whose decoders others have, too
DECODERS = [name for name in tiny_checkpoints.SPECS if name not in TOWERS]
DECODED = ("siglip", "gemma")  # others decode in comparisons of pruning, which begin without any


@pytest.fixture(scope="module")
def pair(request, checkpoints, loaded):
  return checkpoints(request.param), loaded(request.param, batch_size=len(PROMPTS))


def assert_features(actual, tiny, loaded, pixels):
  with torch.no_grad():
    expected = torch.stack(list(tiny.model.get_image_features(pixels).pooler_output)).numpy()
  assert actual.shape == (len(pixels), tiny.num_image_tokens, loaded.config.text.hidden_size)
  np.testing.assert_allclose(actual, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("pair", TOWERS, indirect=True)
def test_image_features(pair, images):
  tiny, loaded = pair
  pixels = torch.cat([tiny.encode(image, "<image>")[1] for image in images])
  encode = jax.jit(lambda model, images: model.bind().encode_images(images)[:2])
  actual, _ = encode(loaded.model, Images(jnp.asarray(pixels.numpy())[:, None]))
  assert_features(actual, tiny, loaded, pixels)


@pytest.mark.parametrize("pair", DECODERS, indirect=True)
def test_image_features_and_logits_at_every_position(pair, images):
  tiny, loaded = pair
  rows = [tiny.encode(image, prompt) for image, prompt in zip(images, PROMPTS, strict=True)]
  batch = jax.tree.map(jnp.asarray, tiny_checkpoints.pad_batch(rows, num_slots=128))
  run = jax.jit(lambda model, inputs: (model.bind().encode_images(inputs.images)[0], model.bind()(inputs)))
  features, logits = run(loaded.model, batch)
  assert_features(features, tiny, loaded, torch.cat([pixels for _, pixels in rows]))
  assert logits.dtype == jnp.float32
  for row, (input_ids, pixels) in zip(logits, rows, strict=True):
    with torch.no_grad():
      expected = tiny.model(input_ids=input_ids[None], pixel_values=pixels).logits[0].numpy()
    np.testing.assert_allclose(row[: len(input_ids)], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("pair", DECODED, indirect=True)
def test_greedy_tokens(pair, images):
  tiny, loaded = pair
  answers = generate(
    loaded,
    images,
    [prompt.removeprefix("<s>") for prompt in PROMPTS],
    generation=GenerationConfig(max_new_tokens=12),
    inputs=InputConfig("<image>{question}", (112,), len(PROMPTS)),
  )
  for image, prompt, answer in zip(images, PROMPTS, answers, strict=True):
    input_ids, pixels = tiny.encode(image, "<s>" + prompt.removeprefix("<s>"))
    with torch.no_grad():
      expected = tiny.model.generate(
        input_ids=input_ids[None],
        attention_mask=torch.ones_like(input_ids[None]),
        pixel_values=pixels,
        max_new_tokens=12,
        do_sample=False,
      )
      first = tiny.model(input_ids=input_ids[None], pixel_values=pixels).logits[0, -1]
    assert answer.token_ids == expected[0, len(input_ids) :].tolist()
    np.testing.assert_allclose(answer.first_logits, first, atol=TOLERANCE, rtol=0)
    assert answer.kept == []
