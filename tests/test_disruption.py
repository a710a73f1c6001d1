"""Disruptions against transformers' layers with the same pairs taken out, and what controls and means must satisfy."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_himap
import tiny_checkpoints
import torch
from transformers.models.llama import modeling_llama

from experiments.disruption import interventions, study, tables
from experiments.disruption.interventions import BLOCKS, Flows, Intervention
from experiments.flow import tokens
from experiments.flow.decoder import first_logits
from himap_jax.layout import Layout
from himap_jax.llava import Inputs, Llava

PROMPTS = ("<s><image>Where?", "<s>USER: <image>\nWhat is it? ASSISTANT:")
SLOTS, NUM_LAYERS = 72, 6


@pytest.fixture(scope="module", params=["dinov2"])
def subject(request, checkpoints, loaded, images):
  """A tiny model with two embedded rows, and `logits(intervention, active, means, seed)`."""
  tiny, model = checkpoints(request.param), loaded(request.param)
  rows = [tiny.encode(image, prompt) for image, prompt in zip(images[:2], PROMPTS, strict=True)]
  inputs = Inputs(**jax.tree.map(jnp.asarray, tiny_checkpoints.pad_batch(rows, SLOTS)))
  llava = Llava(model.config, jnp.float32)
  embedded = llava.bind({"params": model.params}).embed(inputs)
  hidden, _ = jax.jit(lambda params: interventions.undisturbed(llava, params, embedded))(model.params)

  @functools.partial(jax.jit, static_argnames="intervention")
  def run(params, active, means, keys, *, intervention):
    return interventions.disrupted_logits(llava, params, embedded, hidden, active, intervention, means, keys)

  def logits(intervention, active, means=None, seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    return np.asarray(run(model.params, jnp.asarray(active), means, keys, intervention=intervention))

  class Subject:
    pass

  subject = Subject()
  subject.tiny, subject.rows, subject.embedded, subject.hidden, subject.logits = tiny, rows, embedded, hidden, logits
  subject.model, subject.params = llava, model.params
  subject.plain = np.asarray(first_logits(llava, model.params, embedded, {}))
  return subject


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


@pytest.mark.parametrize("how", ["mask", "zero"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("active", [[0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
def test_against_transformers_layers(subject, block, how, active, monkeypatch):
  active = np.array(active, bool)
  ours = subject.logits(Intervention(block, "block", how), active)
  for number, row in enumerate(subject.rows):
    theirs = in_torch(subject.tiny, row, block, active, how, monkeypatch)
    np.testing.assert_allclose(ours[number], theirs, atol=1e-4)
    assert np.abs(theirs - subject.plain[number]).max() > 1e-3


@pytest.mark.parametrize("block", BLOCKS)
def test_one_question_s_own_mean_changes_nothing(subject, block):
  own = interventions.flows(subject.model, subject.params, subject.embedded, subject.hidden)
  result = subject.logits(Intervention(block, "block", "mean"), np.ones(NUM_LAYERS, bool), own)
  np.testing.assert_allclose(result, subject.plain, atol=1e-4)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_mean_of_nothing_is_zero(subject, block):
  active = np.arange(NUM_LAYERS) >= 3
  shape = jax.eval_shape(lambda: interventions.flows(subject.model, subject.params, subject.embedded, subject.hidden))
  nothing = Flows(*(jnp.zeros(part.shape, part.dtype) for part in shape))
  with_mean = subject.logits(Intervention(block, "block", "mean"), active, nothing)
  zeroed = subject.logits(Intervention(block, "block", "zero"), active)
  np.testing.assert_allclose(with_mean, zeroed, atol=1e-5)


def test_the_mean_is_of_the_other_questions_at_the_same_place(subject):
  _, layout, _ = subject.embedded
  places = np.asarray(interventions.instruction_places(layout, SLOTS))
  lengths = np.asarray(layout.length - layout.image_start) - layout.num_image_tokens
  np.testing.assert_array_equal(places, np.arange(places.shape[1])[None] < lengths[:, None])
  own = Flows(*map(np.asarray, interventions.flows(subject.model, subject.params, subject.embedded, subject.hidden)))
  assert not own.into_instruction[:, ~places].any() and own.into_instruction[:, places].any()
  third, longer = np.float32(2) * own.into_image[:, 0], places.shape[1] + 3  # a question of a larger bucket
  sums = study.Sums(
    into_instruction=np.pad(own.into_instruction.sum(axis=1), ((0, 0), (0, 3), (0, 0), (0, 0)), constant_values=7),
    into_image=own.into_image.sum(axis=1) + third,
    count=np.pad(places.sum(axis=0), (0, 3), constant_values=1),
    num_questions=np.int64(3),
  )
  assert sums.into_instruction.shape[1] == longer
  others = study.mean_of_others(sums, own, places)
  both = places.all(axis=0)
  for row in range(2):
    np.testing.assert_allclose(others.into_image[:, row], (own.into_image[:, 1 - row] + third) / 2, atol=1e-5)
    np.testing.assert_allclose(others.into_instruction[:, row, both], own.into_instruction[:, 1 - row, both], atol=1e-5)
    alone = places[row] & ~places[1 - row]
    assert not others.into_instruction[:, row, alone].any()
  assert (places.sum(axis=1)[0] != places.sum(axis=1)[1]) and both.any()


def test_flows_are_those_of_each_row_alone(subject):
  x, layout, tower = subject.embedded
  parts = []
  for row in range(2):
    alone = (x[row : row + 1], jax.tree.map(lambda a, row=row: a[row : row + 1], layout), tower)
    parts.append(interventions.flows(subject.model, subject.params, alone, subject.hidden[:, row : row + 1]))
  together = interventions.flows(subject.model, subject.params, subject.embedded, subject.hidden)
  for name in Flows._fields:
    each = np.concatenate([np.asarray(getattr(part, name)) for part in parts], axis=1)
    np.testing.assert_allclose(getattr(together, name), each, atol=1e-5)


def test_random_pairs():
  layout = Layout(jnp.array([9, 8], jnp.int32), jnp.array([2, 1], jnp.int32), 4)
  every, block = tokens.all_pairs(layout, 10), tokens.block(layout, 10, "image→instruction")
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
  layout = Layout(jnp.array([9, 8], jnp.int32), jnp.array([2, 1], jnp.int32), 4)
  kinds = {name: np.asarray(kind) for name, kind in tokens.kinds(layout, 10).items()}
  seen = np.zeros((2, 10), int)
  for seed in range(60):
    pairs = np.asarray(interventions._into_random_tokens(layout, 10, jax.random.split(jax.random.key(seed), 2)))
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
def test_controls_depend_on_their_key_alone(subject, chosen):
  intervention = Intervention("image→instruction", chosen, "zero")
  active = np.arange(NUM_LAYERS) == 2
  first, again, other = (subject.logits(intervention, active, seed=seed) for seed in (1, 1, 2))
  np.testing.assert_array_equal(first, again)
  assert np.abs(first - other).max() > 1e-4 and np.abs(first - subject.plain).max() > 1e-4


def test_single_is_one_layer_and_onward_all_after_it(monkeypatch):
  active = []

  def disturbed(model, params, embedded, hidden, layers, *arguments, intervention):
    active.append(np.asarray(layers).astype(int).tolist())
    return jnp.zeros((1, 9))

  monkeypatch.setattr(study, "_undisturbed", lambda *arguments: (None, None, jnp.zeros((1, 9))))
  monkeypatch.setattr(study, "_disturbed", disturbed)
  studied = types.SimpleNamespace(model=None, loaded=types.SimpleNamespace(params=None), num_layers=4, seed=0)
  batch = types.SimpleNamespace(inputs={}, row_ids=["a"], questions=[None])
  outcome = study._measure(studied, batch, [Intervention(BLOCKS[0], "block", "mask")], (1, 2), None)
  assert active == [[0, 1, 0, 0], [0, 0, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]
  assert outcome.overlap.shape == (2, 2, 1)


def test_what_changed():
  plain = np.log(np.array([[0.4, 0.2, 0.15, 0.1, 0.08, 0.07], [0.4, 0.2, 0.15, 0.1, 0.08, 0.07]]))
  disturbed = np.log(np.array([[0.07, 0.2, 0.15, 0.1, 0.08, 0.4], [0.4, 0.2, 0.15, 0.1, 0.08, 0.07]]))
  outcome = study.compare(plain, disturbed)
  np.testing.assert_array_equal(outcome.is_same, [False, True])
  np.testing.assert_allclose(outcome.overlap, [4 / 6, 1])
  np.testing.assert_allclose(outcome.divergence, [0.4 * np.log(0.4 / 0.07) + 0.07 * np.log(0.07 / 0.4), 0], atol=1e-12)


def test_bias_ratio():
  assert tables.bias_ratio(np.float64(0.5), np.float64(0.5), 10) == 0
  assert tables.bias_ratio(np.float64(0.2), np.float64(0.6), 10**9) == pytest.approx(np.log(2), abs=1e-6)
  assert np.isfinite(tables.bias_ratio(np.float64(1), np.float64(0.6), 10))
  one_changed = 1 - (1 - 4 / 6) / 10  # one of the five likeliest tokens in one of ten questions
  assert tables.bias_ratio(np.float64(one_changed), np.float64(1), 10) == pytest.approx(np.log(3))


def test_rows_name_what_was_done():
  """Interventions × modes × layers, each with a value of its own."""
  done = [Intervention(block, "block", "mask") for block in BLOCKS]
  overlap = np.arange(2 * 2 * 3, dtype=np.float64).reshape(4, 3, 1) / 20 * np.ones(2)
  outcome = study.Outcome(overlap > 0.5, overlap, 10 * overlap)
  found = {
    (row["intervention"], row["mode"], row["layer"]): row for row in tables.rows(outcome, done, (1, 4, 5), seed=0)
  }
  expected = iter(range(12))
  for block in BLOCKS:
    for mode in ("single", "onward"):
      for layer in (1, 4, 5):
        row, value = found[f"{block}, mask", mode, layer], next(expected) / 20
        assert row["overlap"] == pytest.approx(value) and row["divergence"] == pytest.approx(10 * value)
        assert row["overlap_low"] == pytest.approx(value) and row["is_same"] == (value > 0.5)
  bias = {(row["mode"], row["layer"]): row["bias"] for row in tables.bias_rows(outcome, done, (1, 4, 5), seed=0)}
  for index, mode in enumerate(("single", "onward")):
    for place, layer in enumerate((1, 4, 5)):
      into_instruction, into_image = ((3 * (2 * block + index) + place) / 20 for block in (0, 1))
      assert bias[mode, layer] == pytest.approx(np.log((1 - into_image + 1 / 12) / (1 - into_instruction + 1 / 12)))
