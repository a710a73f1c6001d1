"""Saliency against PyTorch's gradients of transformers' own attention, and what its sums hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoints
import torch

from experiments.flow import tokens
from experiments.saliency import saliency, tables
from himap_jax.layout import Layout
from himap_jax.llava import Inputs, Llava

PROMPTS = ("<s><image>Where?", "<s>USER: <image>\nWhat is it? ASSISTANT:")
NAMES = ("dinov2",)


@pytest.fixture(scope="module", params=NAMES)
def rows(request, checkpoints, loaded, images):
  """A tiny model, its parameters, and two rows of different length."""
  tiny = checkpoints(request.param)
  encoded = [tiny.encode(image, prompt) for image, prompt in zip(images[:2], PROMPTS, strict=True)]
  inputs = Inputs(**jax.tree.map(jnp.asarray, tiny_checkpoints.pad_batch(encoded, 72)))
  return tiny, loaded(request.param), inputs, encoded


def in_torch(tiny, row, answer):
  """|Σ over heads of A ⊙ ∂L/∂A| of every layer, by autograd on transformers' eager attention."""
  ids, pixels = row
  result = tiny.model(input_ids=ids[None], pixel_values=pixels, output_attentions=True)
  for attention in result.attentions:
    attention.retain_grad()
  torch.nn.functional.cross_entropy(result.logits[:, -1], torch.tensor([answer])).backward()
  return np.stack([np.abs((a * a.grad).sum(1)[0].numpy(force=True)) for a in result.attentions])


def test_against_autograd_in_torch(rows):
  tiny, model, inputs, encoded = rows
  llava = Llava(model.config, jnp.float32)
  embedded = llava.bind({"params": model.params}).embed(inputs)
  answers = jnp.array([7, 200], jnp.int32)
  ours = np.asarray(saliency.saliency(llava, model.params, embedded, answers, (0, 1, 2, 3, 4, 5)))
  for row, (ids, pixels) in enumerate(encoded):
    theirs = in_torch(tiny, (ids, pixels), int(answers[row]))
    assert theirs.max() > 1e-2
    np.testing.assert_allclose(ours[:, row, : len(ids), : len(ids)], theirs, atol=1e-4, rtol=1e-3)
    assert not ours[:, row, len(ids) :].any() and not ours[:, row, :, len(ids) :].any()


def test_a_few_layers_at_a_time_are_the_same(rows):
  _, model, inputs, _ = rows
  llava = Llava(model.config, jnp.float32)
  whole, answers = saliency.flow_of(llava, model.params, inputs, None, layers=(0, 1, 2, 3, 4, 5))
  parts = [
    saliency.flow_of(llava, model.params, inputs, answers, layers=layers)[0] for layers in ((0, 1, 2, 3), (4, 5))
  ]
  for name in ("sums", "contributions", "to_instruction", "to_image"):
    joined = np.concatenate([getattr(part, name) for part in parts])
    np.testing.assert_allclose(joined, getattr(whole, name), rtol=1e-4, atol=1e-6)
  logits = llava.apply({"params": model.params}, inputs)
  last = np.asarray(logits)[np.arange(2), np.asarray(inputs.length) - 1]
  np.testing.assert_array_equal(answers, last.argmax(axis=-1))


def test_sums_of_blocks():
  layout = Layout(jnp.array([7, 6], jnp.int32), jnp.array([2, 1], jnp.int32), 3)  # s s i i i t t ., s i i i t t . .
  values = jax.random.uniform(jax.random.key(0), (2, 2, 8, 8)) * jnp.tril(jnp.ones((8, 8)))[None, None]
  result = saliency.flow(values, layout)
  v = np.asarray(values)
  parts = [
    {"system": (0, 2), "image": (2, 5), "instruction": (5, 7)},
    {"system": (0, 1), "image": (1, 4), "instruction": (4, 6)},
  ]
  for row, part in enumerate(parts):
    for number, (query, key) in enumerate(tokens.BLOCKS.values()):
      (a, b), (c, d) = part[query], part[key]
      pairs = [(i, j) for i in range(a, b) for j in range(c, d) if j < i]
      expected = sum(v[:, row, i, j] for i, j in pairs)
      np.testing.assert_allclose(result.sums[:, row, number], expected, rtol=1e-5)
      assert result.pairs[row, number] == len(pairs)
    for number, kind in enumerate(tokens.KINDS):
      a, b = part[kind]
      last = part["instruction"][1] - 1
      np.testing.assert_allclose(result.contributions[:, row, number], v[:, row, last, a:b].sum(1), rtol=1e-5)
      assert result.num_tokens[row, number] == b - a
    (a, b), (c, d) = part["instruction"], part["image"]
    np.testing.assert_allclose(result.to_instruction[:, row], v[:, row, a:b, c:d].sum(1), rtol=1e-5)
    within = np.tril(v[:, row, c:d, c:d], -1)
    np.testing.assert_allclose(result.to_image[:, row], within.sum(1), rtol=1e-5)


def test_where_the_flows_take_turns():
  """In the last layer nothing flows within the image, whatever the model does before."""
  assert tables.turning_layer(np.array([0.1, 2, 0.5, 3, 4, 0])) == 3
  assert tables.turning_layer(np.array([2.0, 2, 0])) == 0
  assert tables.turning_layer(np.array([0.1, 2, 0.5, 3, 0.9, 0])) is None


def test_normalisations():
  layers, questions = 2, 3
  rng = np.random.default_rng(0)
  sums = rng.random((layers, questions, len(tokens.BLOCKS)))
  contributions = rng.random((layers, questions, 3)) * [0, 1, 1]  # no system prompt
  flow = saliency.Flow(
    sums=sums,
    pairs=np.tile(np.arange(len(tokens.BLOCKS)), (questions, 1)),
    contributions=contributions,
    num_tokens=np.tile([0, 4, 2], (questions, 1)),
    to_instruction=None,
    to_image=None,
  )
  blocks, shares = tables.blocks(flow, 5), tables.contributions(flow)
  np.testing.assert_allclose(blocks.by_pair[..., 3], sums[..., 3] / 3)
  np.testing.assert_allclose(blocks.summed, sums / 5)
  np.testing.assert_allclose(shares.whole.sum(axis=-1), 1)
  each = contributions[..., 1] / 4, contributions[..., 2] / 2
  np.testing.assert_allclose(shares.by_token[..., 1], each[0] / (each[0] + each[1]))
