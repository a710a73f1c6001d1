"""The studies of a model whose text reads the image by cross-attention, against transformers' own modules."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoints
import tiny_mllama
import torch

from experiments.flow import disruption, interventions, saliency, tokens
from experiments.flow.interventions import BLOCKS, Intervention
from experiments.shared import study
from himap_jax import UserError, checkpoint
from himap_jax.engine.batching import Batcher, ImageBucket
from himap_jax.inputs import IMAGE, PADDING, TEXT, Layout
from himap_jax.model.cross_attention import CrossLayout

pytestmark = pytest.mark.sampled(of="files of studies", by="file")

CROSS, NUM_LAYERS, N = tiny_mllama.CROSS_LAYERS, tiny_mllama.TEXT["num_hidden_layers"], tiny_mllama.N
QUESTIONS = ("Look: <image>What is it?", "<image>Why?")
SIZES = ((20, 80), (28, 20))  # of three tiles and one


@pytest.fixture(scope="module")
def subject(mllama, tmp_path_factory):
  """Both frameworks, a batch of two rows, and each row's inputs of transformers and number of `<|image|>`'s slot."""
  loaded = checkpoint.load(str(mllama.directory), dtype=jnp.float32, cache_dir=tmp_path_factory.mktemp("cache"))
  prompts = loaded.prompts("<image>{question}")
  pictures = [tiny_checkpoints.noise_image(size, seed) for seed, size in enumerate(SIZES)]
  examples = [prompts.prepare([image], text) for image, text in zip(pictures, QUESTIONS, strict=True)]
  batcher = Batcher(512, prompts.blank, [ImageBucket(4, N)], buckets=(40,))
  inputs = jax.tree.map(jnp.asarray, batcher.pack(examples, bucket=batcher.buckets[0], batch_size=2))
  rows = []
  for image, text, example in zip(pictures, QUESTIONS, examples, strict=True):
    batch = mllama.encode([image], prompts.prompt(text))
    assert batch["input_ids"][0].tolist() == example.tokens[example.image_id < 0].tolist()
    rows.append((batch, int(np.flatnonzero(example.image_id >= 0)[0]) - 1))
  return types.SimpleNamespace(torch=mllama.model, model=loaded.model, inputs=inputs, rows=rows)


def in_torch(model, batch):
  """The last token's most likely successor, and |Σ over heads of A ⊙ ∂L/∂A| of every layer by autograd."""
  maps, hooks = [], []

  def keep(module, inputs, output):
    output[1].retain_grad()
    maps.append(output[1])

  for index, layer in enumerate(model.model.language_model.layers):
    attention = layer.cross_attn if index in CROSS else layer.self_attn
    hooks.append(attention.register_forward_hook(keep))
  logits = model(**batch).logits[:, -1]
  for hook in hooks:
    hook.remove()
  answer = logits.argmax(dim=-1)
  torch.nn.functional.cross_entropy(logits, answer).backward()
  return int(answer), [np.abs((own * own.grad).sum(1)[0].numpy(force=True)) for own in maps]


def test_saliency_against_autograd_in_torch(subject):
  """Sums over blocks, into the last token and from every image token."""
  found = saliency.flow_of(subject.model, subject.inputs, None, layers=tuple(range(NUM_LAYERS)))
  flow, answers = jax.tree.map(np.asarray, found)
  close = dict(atol=1e-5, rtol=1e-3)
  for row, (batch, last_of_system) in enumerate(subject.rows):
    answer, theirs = in_torch(subject.torch, batch)
    assert answers[row] == answer
    start, length = last_of_system + 1, batch["input_ids"].shape[1]
    num_read = int(batch["aspect_ratio_mask"].sum()) * tiny_mllama.TOKENS
    part = {"system": slice(0, start), "instruction": slice(start, length)}
    count = {"system": start, "instruction": length - start, "image": N}
    np.testing.assert_array_equal(flow.num_tokens[:, row], [[count[kind] for kind in tokens.KINDS]] * NUM_LAYERS)
    for layer, values in enumerate(theirs):
      sums, pairs, contributions = (part[layer, row] for part in (flow.sums, flow.pairs, flow.contributions))
      if layer in CROSS:
        assert values[start:].max() > 1e-4
        np.testing.assert_allclose(sums[0], values[start:].sum(), **close)
        np.testing.assert_allclose(flow.to_instruction[layer, row], values[start:].sum(axis=0), **close)
        np.testing.assert_allclose(contributions, [0, values[-1].sum(), 0], **close)
        assert pairs.tolist() == [(length - start) * num_read, *[0] * 5] and np.isnan(sums[1:]).all()
        continue
      values = np.tril(values, -1)
      for number, (query, key) in enumerate(tokens.BLOCKS.values()):
        if "image" in (query, key):
          assert np.isnan(sums[number]) and pairs[number] == 0
        else:
          np.testing.assert_allclose(sums[number], values[part[query], part[key]].sum(), **close)
          expected = np.tril(np.ones((length, length)), -1)[part[query], part[key]].sum()
          assert pairs[number] == expected
      np.testing.assert_allclose(contributions[[0, 1]], [values[-1, part["system"]].sum(), 0], **close)
      assert not flow.to_instruction[layer, row].any()
    assert not flow.to_image.any()


def cut(model, batch, start, active):
  """The last token's logits when the active cross layers' attention gives the instruction nothing."""

  def zero(module, inputs, output):
    context = output[0].clone()
    context[:, start:] = 0
    return context, *output[1:]

  layers = model.model.language_model.layers
  hooks = [layers[layer].cross_attn.register_forward_hook(zero) for layer in CROSS if active[layer]]
  with torch.no_grad():
    logits = model(**batch).logits[0, -1].numpy()
  for hook in hooks:
    hook.remove()
  return logits


def test_disruption_against_transformers_with_the_output_of_attention_zeroed(subject):
  plain = interventions.undisturbed(subject.model, subject.inputs)
  flows, present = interventions.flows(subject.model, plain)
  own = [batch["input_ids"].shape[1] - start - 1 for batch, start in subject.rows]
  assert np.asarray(present).sum(axis=1).tolist() == own and present.shape[1] == 40
  assert [bool(np.asarray(flow).any()) for flow in flows] == [layer in CROSS for layer in range(NUM_LAYERS)]

  def logits(how, active, means=None, chosen="block"):
    one = Intervention(BLOCKS[0], chosen, how)
    seeds = np.array([3, 4], np.uint32)
    return np.asarray(interventions.disrupted_logits(subject.model, plain, one, np.asarray(active), means, seeds))

  layers = np.arange(NUM_LAYERS)
  for active in (layers == 3, layers >= 3, layers >= 1):
    expected = np.stack([cut(subject.torch, batch, start + 1, active) for batch, start in subject.rows])
    np.testing.assert_allclose(logits("zero", active), expected, atol=1e-4)
    assert (np.abs(expected - plain.logits).max(axis=1) > 1e-3).all()
  with_mean = logits("mean", layers >= 1, jnp.zeros_like(flows)), logits("mean", layers >= 1, flows)
  np.testing.assert_allclose(with_mean[0], expected, atol=1e-4)
  np.testing.assert_allclose(with_mean[1], plain.logits, atol=1e-4)
  hidden = logits("mask", layers == 3, chosen="random")
  assert np.isfinite(hidden).all() and (np.abs(hidden - plain.logits).max(axis=1) > 1e-4).all()


def test_all_pairs_of_a_query_hidden_leave_zero(subject):
  plain = interventions.undisturbed(subject.model, subject.inputs)
  one, active = Intervention(BLOCKS[0], "block", "mask"), np.arange(NUM_LAYERS) >= 1
  ours = interventions.disrupted_logits(subject.model, plain, one, active, None, np.zeros(2, np.uint32))
  expected = [cut(subject.torch, batch, start + 1, active) for batch, start in subject.rows]
  np.testing.assert_allclose(ours, expected, atol=1e-4)


def two_rows():
  """Rows `ss<iiii ttt..` and `<iiii t.....`, of whose pictures the last two image tokens are padding."""
  kind = np.full((2, 12), PADDING)
  for row, (length, start) in enumerate(((10, 3), (7, 1))):
    kind[row, :length] = TEXT
    kind[row, start : start + 4] = IMAGE
  layout = jax.tree.map(jnp.asarray, Layout.of_rows(kind, np.zeros_like(kind), 4))
  return CrossLayout.of(layout, jnp.asarray([[False, False, True, True]] * 2))


def test_what_sees_what():
  """Also the system prompt sees the image, all of it, in pairs of no block."""
  layout = two_rows()
  expected = np.zeros((2, 12, 12), bool)
  for row, (system, length, first) in enumerate(((3, 10, 3), (1, 7, 1))):
    texts = [*range(system), *range(first + 4, length)]
    for query in texts:
      expected[row, query, [key for key in texts if key < query]] = True
      expected[row, query, first : first + (4 if query < system - 1 else 2)] = True
  np.testing.assert_array_equal(tokens.visible(layout), expected)
  blocks = {name: np.asarray(tokens.block(layout, name)).sum(axis=(1, 2)).tolist() for name in tokens.BLOCKS}
  assert blocks["image→instruction"] == [6, 4] and blocks["system→instruction"] == [9, 2]
  assert blocks["image→image"] == blocks["system→image"] == [0, 0]


def test_layers_of_blocks():
  text = types.SimpleNamespace(num_hidden_layers=4, cross_attention_layers=(1, 2))
  assert [tokens.layers_of(text, name) for name in tokens.BLOCKS] == [(1, 2), (), (0, 3), (0, 3), (), (0, 3)]


def test_random_tokens_are_text():
  layout, seen = two_rows(), np.zeros((2, 12), int)
  draw = jax.jit(interventions._into_random_tokens)
  for seed in range(30):
    into = np.asarray(draw(layout, jax.random.split(jax.random.key(seed), 2))).any(axis=2)
    assert into.sum(axis=1).tolist() == [3, 2]
    seen += into
  np.testing.assert_array_equal(seen > 0, np.asarray(layout.kind) == TEXT)


def test_depths():
  """Two cross layers of five; the second question's flow is all in the first of them."""
  sums, contributions = np.full((5, 2, 6), np.nan), np.zeros((5, 2, 3))
  sums[[1, 4], :, 0] = [[1, 5], [3, 0]]
  contributions[[1, 4], :, 1] = 1
  contributions[[0, 2], :, 2] = 9
  rows = saliency.depths(saliency.Flow(sums, None, contributions, None, None, None), (1, 4))
  found = [(row["flow"], row["first_half"], row["depth"], row["even_first_half"], row["even_depth"]) for row in rows]
  assert found == [
    ("image→instruction", (1 / 4 + 1) / 2, ((1 / 4 + 3) / 4 + 1 / 4) / 2, 0.5, 0.625),
    ("image→last token", 0.5, 0.625, 0.5, 0.625),
  ]
  assert rows[0]["first_half_low"] == 0.25 and rows[0]["first_half_high"] == 1
  shares = saliency.contributions(
    saliency.Flow(None, None, contributions, np.ones((5, 2, 3)), None, None), of_all_layers=True
  )
  np.testing.assert_allclose(shares["whole"].sum(axis=(0, 2)), 1)
  np.testing.assert_allclose(shares["whole"][1, :, 1], 1 / 20)


@pytest.mark.parametrize("given, message", [(["2"], "in layers 1, 4 alone"), (["5"], "has layers 0 to 4")])
def test_layers_that_read_no_image(given, message):
  text = types.SimpleNamespace(cross_attention_layers=(1, 4))
  opened = types.SimpleNamespace(config=types.SimpleNamespace(text=text))
  subject = types.SimpleNamespace(opened=opened, num_layers=5)
  with pytest.raises(UserError, match=f"--layers: the model .*{message}"):
    study.layers(types.SimpleNamespace(name="layers", value=given), subject)
  assert study.layers(types.SimpleNamespace(name="layers", value=None), subject) == (1, 4)


def test_the_report_of_a_disruption_says_why_there_is_no_bias_ratio():
  rows = [{"intervention": "x", "mode": "single", "layer": 1}]
  rows[0] |= dict.fromkeys(("is_same", "is_same_low", "is_same_high", "overlap", "overlap_low", "overlap_high"), 0.5)
  assert "there is no bias ratio" in disruption.summary(rows, None)[-1]
