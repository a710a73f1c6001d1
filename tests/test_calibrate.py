"""Calibration: what a schedule loses, computed token by token; the best of all that the budget allows; and a run of it."""

import csv
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.calibrate import measure, propose, study
from experiments.calibrate.propose import Measured
from experiments.flow.subject import Subject
from experiments.question_sets import Question
from himap_jax.generation import Generator
from himap_jax.llava import Llava
from himap_jax.methods import build_schedule
from himap_jax.processing import Processor

L, Q, N = 5, 3, 8


@pytest.fixture
def measured():
  rng = np.random.default_rng(0)
  flows = [rng.exponential(size=(L, Q, N)) for _ in range(2)]
  return Measured(*flows, rng.random(L), rng.random(L), *(rng.random((L, Q, N)) for _ in range(2)))


def price(layers, keep):
  """Token-layers in units of no pruning."""
  return (layers[0] * N + (layers[1] - layers[0]) * keep[0] + (L - layers[1]) * keep[1]) / (L * N)


def test_everything_that_matters_is_one(measured):
  weights = propose.matter(measured)
  np.testing.assert_allclose(weights.sum(axis=(0, 2)), 1)
  share = measured.to_instruction[2, 1, 3] / measured.to_instruction[2, 1].sum() * measured.instruction_weight[2]
  share += measured.to_image[2, 1, 3] / measured.to_image[2, 1].sum() * measured.image_weight[2]
  assert weights[2, 1, 3] == pytest.approx(share / (measured.instruction_weight + measured.image_weight).sum())


def lost(measured, layers, keep):
  """Layer by layer, token by token."""
  weights, total = propose.matter(measured), 0.0
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
  monkeypatch.setattr(propose, "LEAST", 1)
  budget = 0.6
  found = propose.propose(measured, price, budget, count=3)
  firsts = sorted({round(share * N) for share in propose.SHARES})
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
  with pytest.raises(ValueError, match="raise --budget"):
    propose.propose(measured, price, 0.1, count=1)


def test_where_a_flow_has_finished():
  assert propose.finished([5, 3, 1, 0.5, 0.5], 0.1) == 3
  assert propose.finished([1, 1, 1, 1], 0.1) == 4


def test_what_to_expect_is_not_what_was_chosen():
  rng = np.random.default_rng(0)

  def tried(same):
    return study.Tried("", 0.5, (float(same.mean()), 0, 1), same, propose.Proposal((1, 2), (3, 2), 0.5, (0.5, 0.5)))

  draws = [[tried(rng.integers(0, 2, 100).astype(float)) for _ in range(30)] for _ in range(20)]
  assert np.mean([study.best(coins).agreement[0] for coins in draws]) > 0.58
  expected = [study.expected_agreement(coins, seed=0) for coins in draws]
  assert abs(np.mean([share for share, *_ in expected]) - 0.5) < 0.03
  assert sum(low <= 0.5 <= high for _, low, high in expected) >= 16
  alone = study.expected_agreement(draws[0][:1], seed=0)
  assert alone[0] == pytest.approx(draws[0][0].agreement[0])


def test_a_calibration(loaded, images, tmp_path, monkeypatch):
  model = loaded("clip_mha")
  for number, image in enumerate(images):
    image.save(tmp_path / f"{number}.png")
  questions = [Question(f"q{i}", tmp_path / f"{i}.png", "Why?", "", "question", "") for i in range(4)]
  studied = Subject(
    loaded=model,
    model=Llava(model.config, jnp.float32),
    processor=Processor(model.processor, model.config, template="<image>{question}", buckets=(24,), max_new_tokens=3),
    questions=questions,
    batch_size=2,
    seed=0,
    settings={"checkpoint": "tiny"},
  )
  found = measure.measure(studied, tmp_path, layers_at_a_time=6, disrupted_layers=(0, 2, 5))
  assert found.to_image.shape == found.instruction_scores.shape == (6, 4, 16)
  assert found.image_weight[1] == pytest.approx((found.image_weight[0] + found.image_weight[2]) / 2)
  for layer in range(6):  # a causal softmax: the image's rows give the image and the text before it one each
    assert (found.image_scores[layer].sum(axis=1) < 16).all() and (found.instruction_scores[layer] > 0).all()
  for batch in studied.batches("scores"):
    rows = slice(2 * batch.number, 2 * batch.number + 2)
    for method, received in (
      ("instruction_attention", found.instruction_scores),
      ("image_attention", found.image_scores),
    ):
      schedule = build_schedule(method, num_layers=6, num_image_tokens=16, prune_layers=(3,), keep=(5,))
      kept = Generator(model, schedule, max_new_tokens=1, seed=0)(batch.inputs, batch.row_ids).kept[0]
      np.testing.assert_array_equal(kept, [sorted(order[:5]) for order in np.argsort(-received[2, rows], axis=1)])
  outcome = np.load(tmp_path / "disruption" / "outcome-00000.npz")["overlap"]  # [block × mode, layer, question]
  other = np.load(tmp_path / "disruption" / "outcome-00001.npz")["overlap"]
  for number, weight in ((0, found.instruction_weight), (2, found.image_weight)):
    changed = 1 - np.concatenate([outcome[number], other[number]], axis=1).mean(axis=1)
    np.testing.assert_allclose(weight[[0, 2, 5]], changed)
  tried = study.try_proposals(studied, found, 0.6, tmp_path, count=2, max_new_tokens=3)
  chosen = study.best(tried)
  assert chosen.price <= 0.6 and chosen.agreement[0] == max(one.agreement[0] for one in tried)
  plain, given = (json.loads(path.read_text()) for path in (
    tmp_path / "calibration-none.json",
    tmp_path / f"calibration-{'_'.join(map(str, (*chosen.proposal.prune_layers, *chosen.proposal.keep)))}.json",
  ))  # fmt: skip
  assert chosen.agreement[0] == np.mean([plain[name] == given[name] for name in plain])
  content = study.describe(chosen, (0.5, 0.2, 0.7), studied, found)
  assert content["prune_layers"] == list(chosen.proposal.prune_layers) and content["keep"] == list(chosen.proposal.keep)
  for name, value in (("PAPER", ((1, 3), (8, 2))), ("GRID_FIRST", (1,)), ("GRID_SECOND", (0.5,))):
    monkeypatch.setattr(study, name, value)
  compared = study.compare(studied, chosen, found, 0.6, tmp_path, max_new_tokens=3)
  assert [one.name for one in compared] == ["calibrated", "the paper's", "grid", "grid"]
  assert (compared[1].proposal.prune_layers, compared[1].proposal.keep) == ((1, 3), (8, 2)) and compared[
    2
  ].proposal.prune_layers == (1, 3)
  assert compared[0].proposal == chosen.proposal and max(one.price for one in compared[2:]) <= 0.6
  assert compared[1].proposal.lost > compared[0].proposal.lost
  study.write(tmp_path, tried, (0.5, 0.2, 0.7), compared, "Heading.", seed=0)
  with open(tmp_path / "calibrate.csv", newline="") as file:
    rows = [row for row in csv.DictReader(file) if row["questions"] == "held out"]
  for row, one in zip(rows, compared, strict=True):
    difference = one.agreement[0] - compared[0].agreement[0]
    assert float(row["difference"]) == pytest.approx(difference) and float(row["lost"]) == one.proposal.lost
    assert float(row["difference_low"]) <= difference <= float(row["difference_high"])
  assert (tmp_path / "calibrate.md").read_text().count("| grid |") == 2
  jax.clear_caches()
