"""Saliency against PyTorch's gradients of transformers' own attention, and what its sums hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoints
import torch

from experiments.flow import saliency, tokens
from himap_jax.inputs import IMAGE, PADDING, TEXT, Layout

pytestmark = pytest.mark.sampled(of="files of studies", by="file")

PROMPTS = ("<s><image>Where?", "<s>USER: <image>\nWhat is it? ASSISTANT:")
NAMES = ("dinov2_shrunk",)


@pytest.fixture(scope="module", params=NAMES)
def rows(request, checkpoints, loaded, images):
  """A tiny model in both frameworks, and two rows of different length."""
  tiny = checkpoints(request.param)
  encoded = [tiny.encode(image, prompt) for image, prompt in zip(images[:2], PROMPTS, strict=True)]
  inputs = jax.tree.map(jnp.asarray, tiny_checkpoints.pad_batch(encoded, 72))
  return tiny, loaded(request.param).model, inputs, encoded


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
  answers = jnp.array([7, 200], jnp.int32)
  ours = np.asarray(saliency.saliency(model, model.bind().embed(inputs), answers, (0, 1, 2, 3)))
  for row, (ids, pixels) in enumerate(encoded):
    theirs = in_torch(tiny, (ids, pixels), int(answers[row]))
    assert theirs.max() > 1e-2
    np.testing.assert_allclose(ours[:, row, : len(ids), : len(ids)], theirs, atol=1e-4, rtol=1e-3)
    assert not ours[:, row, len(ids) :].any() and not ours[:, row, :, len(ids) :].any()


def test_a_few_layers_at_a_time_are_the_same(rows):
  _, model, inputs, _ = rows
  whole, answers = saliency.flow_of(model, inputs, None, layers=(0, 1, 2, 3))
  parts = [saliency.flow_of(model, inputs, answers, layers=layers)[0] for layers in ((0, 1, 2), (3,))]
  for name in saliency.Flow._fields:
    joined = np.concatenate([getattr(part, name) for part in parts])
    np.testing.assert_allclose(joined, getattr(whole, name), rtol=1e-4, atol=1e-6)
  last = np.asarray(model.bind()(inputs))[np.arange(2), np.asarray(inputs.layout.last_slot())]
  np.testing.assert_array_equal(answers, last.argmax(axis=-1))


def layout_of(*rows):
  """A layout from a letter for every slot: system, image, instruction (text), or a period for padding."""
  kind = np.array([[{"s": TEXT, "t": TEXT, "i": IMAGE, ".": PADDING}[letter] for letter in row] for row in rows])
  layout = Layout.of_rows(kind, np.zeros_like(kind), int((kind == IMAGE).sum(axis=1).max()))
  return jax.tree.map(jnp.asarray, layout)


def test_sums_of_blocks():
  layout = layout_of("ssiiitt.", "siiitt..")
  values = jax.random.uniform(jax.random.key(0), (2, 2, 8, 8)) * jnp.tril(jnp.ones((8, 8)))[None, None]
  result = jax.vmap(saliency.flow, in_axes=(0, None))(values, layout)
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
      np.testing.assert_array_equal(result.pairs[:, row, number], len(pairs))
    for number, kind in enumerate(tokens.KINDS):
      a, b = part[kind]
      last = part["instruction"][1] - 1
      np.testing.assert_allclose(result.contributions[:, row, number], v[:, row, last, a:b].sum(1), rtol=1e-5)
      np.testing.assert_array_equal(result.num_tokens[:, row, number], b - a)
    (a, b), (c, d) = part["instruction"], part["image"]
    np.testing.assert_allclose(result.to_instruction[:, row], v[:, row, a:b, c:d].sum(1), rtol=1e-5)
    within = np.tril(v[:, row, c:d, c:d], -1)
    np.testing.assert_allclose(result.to_image[:, row], within.sum(1), rtol=1e-5)


def test_kinds_where_images_are_apart():
  """Text between images is neither system prompt nor instruction, and all tokens before a query are earlier."""
  layout = layout_of("siitiitt.", "iittttt..")
  kinds = {name: np.asarray(kind).astype(int).tolist() for name, kind in tokens.kinds(layout).items()}
  assert kinds["system"] == [[1, 0, 0, 0, 0, 0, 0, 0, 0], [0] * 9]
  assert kinds["image"] == [[0, 1, 1, 0, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0, 0]]
  assert kinds["instruction"] == [[0, 0, 0, 0, 0, 0, 1, 1, 0], [0, 0, 1, 1, 1, 1, 1, 0, 0]]
  earlier = np.asarray(tokens.visible(layout))
  for row, count in enumerate((8, 7)):
    expected = np.zeros((9, 9), bool)
    expected[:count, :count] = np.tri(count, k=-1, dtype=bool)
    np.testing.assert_array_equal(earlier[row], expected)


def test_where_the_flows_take_turns():
  """In the last layer nothing flows within the image, whatever the model does before."""
  assert saliency.turning_layer(np.array([0.1, 2, 0.5, 3, 4, 0])) == 3
  assert saliency.turning_layer(np.array([2.0, 2, 0])) == 0
  assert saliency.turning_layer(np.array([0.1, 2, 0.5, 3, 0.9, 0])) is None


def test_normalisations():
  layers, questions = 2, 3
  rng = np.random.default_rng(0)
  sums = rng.random((layers, questions, len(tokens.BLOCKS)))
  contributions = rng.random((layers, questions, 3)) * [0, 1, 1]  # no system prompt
  flow = saliency.Flow(
    sums=sums,
    pairs=np.tile(np.arange(len(tokens.BLOCKS)), (layers, questions, 1)),
    contributions=contributions,
    num_tokens=np.tile([0, 4, 2], (layers, questions, 1)),
    to_instruction=None,
    to_image=None,
  )
  blocks, shares = saliency.blocks(flow, 5), saliency.contributions(flow)
  np.testing.assert_allclose(blocks["by_pair"][..., 3], sums[..., 3] / 3)
  np.testing.assert_allclose(blocks["summed"], sums / 5)
  np.testing.assert_allclose(shares["whole"].sum(axis=-1), 1)
  each = contributions[..., 1] / 4, contributions[..., 2] / 2
  np.testing.assert_allclose(shares["by_token"][..., 1], each[0] / (each[0] + each[1]))
