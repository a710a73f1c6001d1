"""Calibration: a schedule's loss against a sum token by token, the best of all within the budget, and a whole run."""

import functools
import itertools
import json
import pathlib

import jax
import numpy as np
import pytest

from experiments.flow import calibrate, proposals
from experiments.flow.calibrate import Trial, Trials
from experiments.flow.proposals import Measured, Proposal
from experiments.question_sets import Question
from experiments.shared import tabular
from himap_jax.engine.prefill import prefill
from himap_jax.errors import UserError
from himap_jax.pruning.config import build_schedule

L, Q, N = 5, 3, 8


@pytest.fixture
def measured():
  rng = np.random.default_rng(0)
  flows = [rng.exponential(size=(L, Q, N)) for _ in range(2)]
  return Measured(*flows, rng.random(L), rng.random(L), *(rng.random((L, Q, N)) for _ in range(2)))


def price(layers, keep):
  """Token-layers in units of no pruning."""
  return (layers[0] * N + (layers[1] - layers[0]) * keep[0] + (L - layers[1]) * keep[1]) / (L * N)


def test_all_weights_of_a_question_add_up_to_one(measured):
  weights = measured.flow_weights
  np.testing.assert_allclose(weights.sum(axis=(0, 2)), 1)
  share = measured.to_instruction[2, 1, 3] / measured.to_instruction[2, 1].sum() * measured.instruction_weight[2]
  share += measured.to_image[2, 1, 3] / measured.to_image[2, 1].sum() * measured.image_weight[2]
  assert weights[2, 1, 3] == pytest.approx(share / (measured.instruction_weight + measured.image_weight).sum())


def lost(measured, layers, keep):
  """Layer by layer, token by token."""
  weights, total = measured.flow_weights, 0.0
  for q in range(Q):
    kept = set(range(N))
    for layer in range(L):
      if layer == layers[0]:
        scores = measured.instruction_scores[layer - 1, q]
        kept = set(sorted(kept, key=lambda n, s=scores: -s[n])[: keep[0]])
      if layer == layers[1]:
        scores = measured.image_scores[layer - 1, q]
        kept = set(sorted(kept, key=lambda n, s=scores: -s[n])[: keep[1]])
      total += sum(weights[layer, q, n] for n in range(N) if n not in kept)
  return total / Q


def test_the_best_of_all(measured, monkeypatch):
  monkeypatch.setattr(proposals, "LEAST", 1)
  budget = 0.6
  found = proposals.propose(measured, price, budget, count=3)
  firsts = sorted({round(share * N) for share in proposals.SHARES})
  by_layers = {}
  for layers in itertools.combinations(range(1, L), 2):
    for first in firsts:
      affordable = [second for second in range(1, first + 1) if price(layers, (first, second)) <= budget]
      if affordable:
        keep = (first, affordable[-1])
        by_layers.setdefault(layers, []).append((lost(measured, layers, keep), layers, keep))
  expected = sorted(min(options) for options in by_layers.values())[:3]
  np.testing.assert_allclose(
    [p.lost for p in found], [value for value, *_ in expected]
  )  # layers may be a matter of rounding
  for p in found:
    assert p.lost == pytest.approx(lost(measured, p.prune_layers, p.keep))
    assert price(p.prune_layers, p.keep) <= budget and all(0 < share <= 1 for share in p.covered)
  with pytest.raises(UserError, match="raise --budget"):
    proposals.propose(measured, price, 0.1, count=1)


def test_where_a_flow_has_finished():
  assert proposals.finished([5, 3, 1, 0.5, 0.5], 0.1) == 3
  assert proposals.finished([1, 1, 1, 1], 0.1) == 4


def test_what_to_expect_is_not_what_was_chosen():
  rng = np.random.default_rng(0)

  def tried(same):
    return Trial("", 0.5, same, range(100), Proposal((1, 2), (3, 2), 0.5, (0.5, 0.5)))

  draws = [[tried(rng.integers(0, 2, 100).astype(float)) for _ in range(30)] for _ in range(20)]
  assert np.mean([calibrate.best(coins).agreement for coins in draws]) > 0.58
  expected = [calibrate.expected_agreement(coins, seed=0) for coins in draws]
  assert abs(np.mean([row["agreement"] for row in expected]) - 0.5) < 0.03
  assert sum(row["agreement_low"] <= 0.5 <= row["agreement_high"] for row in expected) >= 16
  alone = calibrate.expected_agreement(draws[0][:1], seed=0)
  assert alone["agreement"] == pytest.approx(draws[0][0].agreement)


def test_questions_about_one_picture_are_not_parted():
  questions = [Question(str(n), pathlib.Path(f"{n // 3}.png"), "?", "", "", "") for n in range(30)]
  for seed in range(5):
    rest, heldout = calibrate.split(questions, 10, seed=seed)
    assert len(heldout) == 12 and sorted([*rest, *heldout]) == sorted(questions)
    assert not {own.image for own in rest} & {own.image for own in heldout}
  assert calibrate.split(questions, 0, seed=0) == (questions, [])
  # Two schedules: each right about half of the pictures. Chosen without a picture, the other one is right about it.
  same = np.repeat(np.arange(10) % 2, 10).astype(float)
  proposal, parted = Proposal((1, 2), (3, 2), 0.5, (0.5, 0.5)), np.repeat(np.arange(10), 10).tolist()
  for pictures, low, high in ((parted, 0, 0), (range(100), 0.2, 0.6)):
    two = [Trial("", 0.5, own, pictures, proposal) for own in (same, 1 - same)]
    assert low <= calibrate.expected_agreement(two, seed=0)["agreement"] <= high


@functools.partial(jax.jit, static_argnames="schedule")
def first_kept(model, inputs, schedule):
  keys = jax.random.split(jax.random.key(0), len(inputs.tokens))
  return prefill(model.bind(), inputs, keys, schedule).kept[0]


@pytest.mark.sampled(of="commands of studies")
def test_a_calibration(tiny_subject, tmp_path, monkeypatch):
  subject = tiny_subject(["Why?"] * 4, "dinov2_shrunk")
  found = calibrate.measure(subject, tmp_path, layers_at_a_time=4, disrupted_layers=(0, 2, 3))
  assert found.to_image.shape == found.instruction_scores.shape == (4, 4, 16)
  assert found.image_weight[1] == pytest.approx((found.image_weight[0] + found.image_weight[2]) / 2)
  for layer in range(4):  # a causal softmax: the image's rows give the image and the text before it one each
    assert (found.image_scores[layer].sum(axis=1) < 16).all() and (found.instruction_scores[layer] > 0).all()
  for number, batch in enumerate(subject.batches("scores")):
    rows = slice(2 * number, 2 * number + 2)
    for method, received in (
      ("instruction_attention", found.instruction_scores),
      ("image_attention", found.image_scores),
    ):
      schedule = build_schedule(method, num_layers=4, num_image_tokens=16, prune_layers=(3,), keep=(5,))
      kept = first_kept(subject.loaded.model, batch.inputs, schedule)
      np.testing.assert_array_equal(kept, [sorted(order[:5]) for order in np.argsort(-received[2, rows], axis=1)])
  parts = [np.load(tmp_path / f"outcome-0000{number}.npz")["overlap"] for number in range(2)]
  overlap = np.concatenate(parts, axis=1).reshape(2, 3, 4)  # [block, layer, question]
  for own, weight in zip(overlap, (found.instruction_weight, found.image_weight), strict=True):
    np.testing.assert_allclose(weight[[0, 2, 3]], 1 - own.mean(axis=1))
  trials = Trials(subject, tmp_path / "calibration", 3)
  tried = trials.run(
    [(f"proposal {number}", p) for number, p in enumerate(proposals.propose(found, trials.price, 0.6, count=2))]
  )
  chosen = calibrate.best(tried)
  assert chosen.price <= 0.6 and chosen.agreement == max(one.agreement for one in tried)
  plain, given = (json.loads(path.read_text()) for path in (
    tmp_path / "calibration-none.json",
    tmp_path / f"calibration-{'_'.join(map(str, (*chosen.proposal.prune_layers, *chosen.proposal.keep)))}.json",
  ))  # fmt: skip
  assert chosen.agreement == np.mean([plain[name] == given[name] for name in plain])
  expected = {"agreement": 0.5, "agreement_low": 0.2, "agreement_high": 0.7}
  content = calibrate.describe(chosen, expected, found, "tiny")
  assert content["prune_layers"] == list(chosen.proposal.prune_layers) and content["keep"] == list(chosen.proposal.keep)

  def drawn(own, schedules, *_, **__):
    """In place of answers of the model, which were tried above."""
    return {name: {q.id: "yes" if number % 2 else q.id for q in own.questions} for number, name in enumerate(schedules)}

  monkeypatch.setattr(type(subject), "answers", drawn)
  for name, value in (("PAPER", ((1, 3), (8, 2))), ("GRID_FIRST", (1,)), ("GRID_SECOND", (0.75,))):
    monkeypatch.setattr(calibrate, name, value)
  compared = calibrate.compare(Trials(subject, tmp_path / "heldout", 3), chosen, found, 0.6)
  assert [one.name for one in compared] == ["calibrated", "the paper's", "grid", "grid"]
  assert (compared[1].proposal.prune_layers, compared[1].proposal.keep) == ((1, 3), (8, 2))
  assert compared[2].proposal.prune_layers == (1, 3)
  assert compared[0].proposal == chosen.proposal and max(one.price for one in compared[2:]) <= 0.6
  assert compared[1].proposal.lost > compared[0].proposal.lost
  rows = calibrate.rows_of(compared, "held out", seed=0, reference=compared[0])
  for row, one in zip(rows, compared, strict=True):
    difference = one.agreement - compared[0].agreement
    assert row["difference"] == pytest.approx(difference) and row["lost"] == one.proposal.lost
    assert row["difference_low"] <= difference <= row["difference_high"]
  lines = calibrate.summary(calibrate.rows_of(tried, "calibration", seed=0), expected, rows)
  assert "\n".join(lines).count("| grid |") == 2
  tabular.write_csv(tmp_path / "calibrate.csv", rows)
  assert (tmp_path / "calibrate.csv").read_text().count("\nheld out,") == 4
  jax.clear_caches()
