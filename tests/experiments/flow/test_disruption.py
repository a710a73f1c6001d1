"""Disruptions against transformers' layers with the same pairs taken out, and what controls and means must satisfy."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_himap
import tiny_checkpoints
import torch
from transformers.models.llama import modeling_llama

from experiments.flow import disruption, interventions, tokens
from experiments.flow.decoder import first_logits
from experiments.flow.disruption import Disruption, Sums
from experiments.flow.interventions import BLOCKS, Intervention, Undisturbed
from himap_jax.inputs import IMAGE, PADDING, TEXT, Layout

pytestmark = pytest.mark.sampled(of="files of studies", by="file")

PROMPTS = ("<s><image>Where?", "<s>USER: <image>\nWhat is it? ASSISTANT:")
SLOTS, NUM_LAYERS = 72, 4


@pytest.fixture(scope="module", params=["dinov2_shrunk"])
def subject(request, checkpoints, loaded, images):
  """A tiny model with two rows, their undisturbed prefill, and `logits(intervention, active, means, seed)`."""
  tiny, model = checkpoints(request.param), loaded(request.param).model
  rows = [tiny.encode(image, prompt) for image, prompt in zip(images[:2], PROMPTS, strict=True)]
  plain = interventions.undisturbed(model, jax.tree.map(jnp.asarray, tiny_checkpoints.pad_batch(rows, SLOTS)))

  def logits(intervention, active, means=None, seed=0):
    seeds = np.array([2 * seed, 2 * seed + 1], np.uint32)
    return np.asarray(interventions.disrupted_logits(model, plain, intervention, np.asarray(active), means, seeds))

  own, present = interventions.flows(model, plain)
  unedited = np.asarray(first_logits(model, plain.embedded, {}))
  np.testing.assert_allclose(plain.logits, unedited, atol=1e-4)
  return types.SimpleNamespace(
    tiny=tiny, rows=rows, model=model, undisturbed=plain, logits=logits, plain=unedited, flows=own, present=present
  )


def in_torch(tiny, row, block, active, how, monkeypatch):
  """The last token's logits when transformers' own layers lack a block's pairs."""
  ids, pixels = row
  hidden, first, last = reference_himap.embed(tiny.model, ids, pixels)
  slot = torch.arange(len(ids))
  is_image, is_instruction = (slot >= first) & (slot <= last), slot > last
  rows = is_instruction if block == "image→instruction" else is_image
  taken = rows[:, None] & is_image[None] & (slot[None] < slot[:, None])
  is_active = False

  def attention(module, query, key, value, mask, scaling, dropout=0.0, **kwargs):
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    logits = query @ key.mT * scaling + mask
    if is_active and how == "mask":
      logits = logits.masked_fill(taken, -torch.inf)
    probabilities = logits.softmax(-1)
    if is_active and how == "zero":
      probabilities = probabilities.masked_fill(taken, 0)
    return (probabilities @ value).transpose(1, 2), probabilities

  monkeypatch.setattr(modeling_llama, "eager_attention_forward", attention)
  decoder = tiny.model.model.language_model
  with torch.no_grad():
    for index, layer in enumerate(decoder.layers):
      is_active = bool(active[index])
      hidden, _ = reference_himap.run_layer(decoder, layer, hidden, slot)
    return tiny.model.lm_head(decoder.norm(hidden))[-1].numpy()


@pytest.mark.sampled
@pytest.mark.parametrize("how", ["mask", "zero"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("active", [[0, 0, 1, 0], [0, 0, 1, 1], [1, 1, 1, 1]])
def test_against_transformers_layers(subject, block, how, active, monkeypatch):
  active = np.array(active, bool)
  ours = subject.logits(Intervention(block, "block", how), active)
  for number, row in enumerate(subject.rows):
    theirs = in_torch(subject.tiny, row, block, active, how, monkeypatch)
    np.testing.assert_allclose(ours[number], theirs, atol=1e-4)
    assert np.abs(theirs - subject.plain[number]).max() > 1e-3


@pytest.mark.sampled
@pytest.mark.parametrize("block", BLOCKS)
def test_one_question_s_own_mean_changes_nothing(subject, block):
  result = subject.logits(Intervention(block, "block", "mean"), np.ones(NUM_LAYERS, bool), subject.flows)
  np.testing.assert_allclose(result, subject.plain, atol=1e-4)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_mean_of_nothing_is_zero(subject, block):
  active = np.arange(NUM_LAYERS) >= 2
  with_mean = subject.logits(Intervention(block, "block", "mean"), active, jnp.zeros_like(subject.flows))
  zeroed = subject.logits(Intervention(block, "block", "zero"), active)
  np.testing.assert_allclose(with_mean, zeroed, atol=1e-5)


def test_the_mean_is_of_the_other_questions_at_the_same_place(subject):
  layout, own, present = subject.undisturbed.embedded.layout, np.asarray(subject.flows), np.asarray(subject.present)
  size = layout.num_image_tokens  # then come the places counted from the prompt's end
  lengths = np.asarray(layout.instruction_slots()[1]).sum(axis=1)
  places = present[:, size:]
  assert present[:, :size].all() and present.shape[1] == SLOTS
  np.testing.assert_array_equal(places, np.arange(places.shape[1])[None] < lengths[:, None])
  assert not own[:, ~present].any() and own[:, :, size:][:, places].any()
  third = np.float32(2) * own[:, 0, :size]  # a question of a larger bucket, with an instruction elsewhere
  further = np.full((NUM_LAYERS, 3, *own.shape[3:]), 7, np.float32)
  image, instruction = own[:, :, :size].sum(axis=1) + third, own[:, :, size:].sum(axis=1)
  count = np.concatenate([present[:, :size].sum(axis=0) + 1, places.sum(axis=0), np.ones(3, int)])
  sums = Sums(np.concatenate([image, instruction, further], axis=1), count)
  assert sums.flows.shape[1] == SLOTS + 3
  others = disruption.mean_of_others(sums, own, present)
  both = places.all(axis=0)
  for row in range(2):
    np.testing.assert_allclose(others[:, row, :size], (own[:, 1 - row, :size] + third) / 2, atol=1e-5)
    into_instruction, expected = others[:, row, size:], own[:, 1 - row, size:]
    np.testing.assert_allclose(into_instruction[:, both], expected[:, both], atol=1e-5)
    assert not into_instruction[:, places[row] & ~places[1 - row]].any()
  assert (places.sum(axis=1)[0] != places.sum(axis=1)[1]) and both.any()


def test_flows_are_those_of_each_row_alone(subject):
  embedded, hidden, logits = subject.undisturbed
  for row in range(2):
    rows = slice(row, row + 1)
    alone = jax.tree.map(lambda x, rows=rows: x[rows], (embedded, logits))
    own, _ = interventions.flows(subject.model, Undisturbed(alone[0], hidden[:, rows], alone[1]))
    np.testing.assert_allclose(subject.flows[:, rows], own, atol=1e-5)


def two_rows():
  """Nine and eight tokens, four of an image from the third and from the second on, in ten slots."""
  kind = np.full((2, 10), PADDING)
  for row, (length, start) in enumerate(((9, 2), (8, 1))):
    kind[row, :length] = TEXT
    kind[row, start : start + 4] = IMAGE
  return jax.tree.map(jnp.asarray, Layout.of_rows(kind, np.zeros_like(kind), 4))


def test_random_pairs():
  layout = two_rows()
  every, block = tokens.visible(layout), tokens.block(layout, "image→instruction")
  as_much = jax.jit(interventions._as_much)
  for seed in range(20):
    keys = jax.random.split(jax.random.key(seed), 2)
    chance = jax.vmap(lambda key: jax.random.bits(key, (10, 10)))(keys)
    scores = jnp.where(jnp.tril(jnp.ones((10, 10), bool)), jax.random.normal(keys[0], (2, 10, 10)), -jnp.inf)
    for weights in (every.astype(jnp.float32), jnp.where(every, jax.nn.softmax(scores), 0)):
      taken = np.asarray(as_much(chance, weights, block))
      for row in range(2):
        first = np.argsort(np.asarray(chance)[row], axis=None)
        first = first[np.asarray(every)[row].reshape(-1)[first]]
        target = np.asarray(weights)[row][np.asarray(block)[row]].sum()
        count = int((np.cumsum(np.asarray(weights)[row].reshape(-1)[first]) <= target + 1e-6).sum())
        assert 0 < count < len(first)
        np.testing.assert_array_equal(np.flatnonzero(taken[row]), np.sort(first[:count]))


def test_random_tokens():
  layout = two_rows()
  kinds = {name: np.asarray(kind) for name, kind in tokens.kinds(layout).items()}
  draw, seen = jax.jit(interventions._into_random_tokens), np.zeros((2, 10), int)
  for seed in range(60):
    pairs = np.asarray(draw(layout, jax.random.split(jax.random.key(seed), 2)))
    for row, instruction in enumerate((3, 3)):
      into = pairs[row].any(axis=1)
      first = np.flatnonzero(kinds["image"][row])[0]  # sees no image token before it, and may be drawn
      assert instruction - 1 <= into.sum() <= instruction and not into[first]
      for query in np.flatnonzero(into):
        np.testing.assert_array_equal(pairs[row, query], kinds["image"][row] & (np.arange(10) < query))
      seen[row] += into
  may = kinds["image"] | kinds["instruction"]
  assert not seen[~may].any() and (np.sort(seen[may]) > 0).sum() == may.sum() - 2


@pytest.mark.parametrize("chosen", ["random", "mass", "rows"])
def test_controls_depend_on_their_seed_alone(subject, chosen):
  intervention = Intervention("image→instruction", chosen, "zero")
  active = np.arange(NUM_LAYERS) == 2
  first, again, other = (subject.logits(intervention, active, seed=seed) for seed in (1, 1, 2))
  np.testing.assert_array_equal(first, again)
  assert np.abs(first - other).max() > 1e-4 and np.abs(first - subject.plain).max() > 1e-4


def test_single_is_one_layer_and_onward_all_after_it(monkeypatch):
  active = []

  def disrupted(model, plain, intervention, layers, *arguments):
    active.append(np.asarray(layers).astype(int).tolist())
    return jnp.zeros((1, 9))

  monkeypatch.setattr(interventions, "undisturbed", lambda *arguments: Undisturbed(None, None, jnp.zeros((1, 9))))
  monkeypatch.setattr(interventions, "disrupted_logits", disrupted)
  studied = types.SimpleNamespace(loaded=types.SimpleNamespace(model=None), num_layers=4, seed=0)
  batch = types.SimpleNamespace(inputs={}, row_ids=["a"], questions=[None])
  mask = Intervention(BLOCKS[0], "block", "mask")
  disruptions = [Disruption(mask, mode, layer) for mode in ("single", "onward") for layer in (1, 2)]
  outcome = disruption.outcome_of(studied, batch, disruptions, None)
  assert active == [[0, 1, 0, 0], [0, 0, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]
  assert outcome["overlap"].shape == (4, 1)


def test_what_changed():
  plain = np.log(np.array([[0.4, 0.2, 0.15, 0.1, 0.08, 0.07], [0.4, 0.2, 0.15, 0.1, 0.08, 0.07]]))
  disrupted = np.log(np.array([[0.07, 0.2, 0.15, 0.1, 0.08, 0.4], [0.4, 0.2, 0.15, 0.1, 0.08, 0.07]]))
  outcome = disruption.compare(plain, disrupted)
  np.testing.assert_array_equal(outcome["is_same"], [False, True])
  np.testing.assert_allclose(outcome["overlap"], [4 / 6, 1])
  np.testing.assert_allclose(
    outcome["divergence"], [0.4 * np.log(0.4 / 0.07) + 0.07 * np.log(0.07 / 0.4), 0], atol=1e-12
  )


def test_bias_ratio():
  assert disruption.bias_ratio(np.float64(0.5), np.float64(0.5), 10) == 0
  assert disruption.bias_ratio(np.float64(0.2), np.float64(0.6), 10**9) == pytest.approx(np.log(2), abs=1e-6)
  assert np.isfinite(disruption.bias_ratio(np.float64(1), np.float64(0.6), 10))
  one_changed = 1 - (1 - 4 / 6) / 10  # one of the five most likely tokens in one of ten questions
  assert disruption.bias_ratio(np.float64(one_changed), np.float64(1), 10) == pytest.approx(np.log(3))


def test_rows_name_what_was_done():
  """Interventions × modes × layers, each with a value of its own."""
  masks = [Intervention(block, "block", "mask") for block in BLOCKS]
  disruptions = [
    Disruption(mask, mode, layer) for mask in masks for mode in ("single", "onward") for layer in (1, 4, 5)
  ]
  overlap = np.arange(2 * 2 * 3, dtype=np.float64)[:, None] / 20 * np.ones(2)
  outcome = {"is_same": overlap > 0.5, "overlap": overlap, "divergence": 10 * overlap}
  rows = disruption.consistency_rows(outcome, disruptions, seed=0)
  found = {(row["intervention"], row["mode"], row["layer"]): row for row in rows}
  expected = iter(range(12))
  for block in BLOCKS:
    for mode in ("single", "onward"):
      for layer in (1, 4, 5):
        row, value = found[f"{block}, mask", mode, layer], next(expected) / 20
        assert row["overlap"] == pytest.approx(value) and row["divergence"] == pytest.approx(10 * value)
        assert row["overlap_low"] == pytest.approx(value) and row["is_same"] == (value > 0.5)
  bias = {(row["mode"], row["layer"]): row["bias"] for row in disruption.bias_rows(outcome, disruptions, seed=0)}
  for index, mode in enumerate(("single", "onward")):
    for place, layer in enumerate((1, 4, 5)):
      into_instruction, into_image = ((3 * (2 * block + index) + place) / 20 for block in (0, 1))
      assert bias[mode, layer] == pytest.approx(np.log((1 - into_image + 1 / 12) / (1 - into_instruction + 1 / 12)))
