"""The study of adaptive keep counts: its rungs are those of the method, its figures those of slow sums."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.flow import adaptive
from experiments.flow.adaptive import Outcomes
from experiments.shared import figures
from himap_jax.engine.accounting import model_sizes
from himap_jax.engine.engine import Engine, GenerationConfig
from himap_jax.pruning.config import build_schedule
from himap_jax.pruning.cost import costs
from himap_jax.pruning.methods.himap_adaptive import cheapest_rung, rung_counts
from himap_jax.pruning.schedule import Schedule

pytestmark = pytest.mark.sampled(of="files of studies", by="file")

KEEPS = tuple(zip(rung_counts(0, 12), rung_counts(1, 6), strict=True))
TEXTS = ("Why?", "Where is it?", "What?", "How many?", "Why?")
SIZES = dict(num_layers=4, num_image_tokens=16, prune_layers=(1, 3))
RUNGS = tuple(build_schedule("himap", **SIZES, keep=keep) for keep in KEEPS)


@pytest.fixture(scope="module")
def measured(tiny_subject, tmp_path_factory):
  workdir, subject = tmp_path_factory.mktemp("adaptive"), tiny_subject(TEXTS, "dinov2_shrunk")
  yield subject, adaptive.measure(subject, RUNGS, workdir, max_new_tokens=3), workdir
  jax.clear_caches()


def test_answers_and_rungs_are_those_of_the_method(measured):
  subject, outcomes, workdir = measured
  threshold = float(np.sort(outcomes.mass[0])[2]) - 1e-6  # some on the first rung, some above
  rungs = np.asarray(cheapest_rung(jnp.asarray(outcomes.mass.T), jnp.float32(threshold)))
  assert len(set(rungs.tolist())) > 1
  schedule = build_schedule("himap_adaptive", **SIZES, keep=KEEPS[-1], parameters={"threshold": threshold})
  engine = Engine(subject.loaded.model, schedule, GenerationConfig(3), eos_token_ids=subject.loaded.eos_token_ids)
  given = [json.loads((workdir / f"answers-{first}_{second}.json").read_text()) for first, second in KEEPS]
  number = 0
  for batch in subject.batches("test"):
    found = engine(batch.inputs, batch.row_ids)
    for row, question in enumerate(batch.questions):
      assert question == subject.questions[number]
      assert tuple(len(stage[row]) for stage in found.kept) == KEEPS[rungs[number]]
      assert subject.processor.decode(found.tokens[row]) == given[rungs[number]][question.id]
      number += 1
  assert number == len(TEXTS)


def test_prices_are_those_of_all_tokens(measured):
  subject, outcomes, _ = measured
  length, sizes = subject.example(subject.questions[1]).num_text_tokens, model_sizes(subject.loaded.config, (28, 28))
  for price, schedule in zip(outcomes.price, (*RUNGS, Schedule()), strict=True):
    own, plain = (costs(sizes, s, 16, length) for s in (schedule, Schedule()))
    assert price[1] == pytest.approx((own.decoder + own.scoring) / plain.decoder)
  assert (np.diff(outcomes.price, axis=0) > 0).all()


def test_the_table_against_slow_sums(tmp_path):
  rng = np.random.default_rng(0)
  count = 40
  price = np.sort(rng.random((4, count)), axis=0)
  price[-1] = 1
  right, same = (rng.random((4, count)).round() for _ in range(2))
  same[-1] = 1
  mass = np.sort(rng.random((3, count)), axis=0)
  outcomes = Outcomes(price, right, same, mass, ["4/2", "8/3", "12/6"])
  fixed, adapted = adaptive.rows(outcomes, (0.3, 0.7), seed=0)
  assert [row["keep"] for row in fixed] == ["4/2", "8/3", "12/6", "no pruning"]
  for rung in range(3):
    stay, change = ([mass[rung, q] for q in range(count) if (same[rung, q] == 1) == stays] for stays in (True, False))
    pairs = [(one > other) + (one == other) / 2 for one in stay for other in change]
    assert fixed[rung]["mass_tells"] == pytest.approx(sum(pairs) / len(pairs))
  assert "mass_tells" not in fixed[3]
  for row, threshold in zip(adapted, (0.3, 0.7), strict=True):
    spent, good, rungs = 0.0, 0.0, [0, 0, 0]
    for q in range(count):
      rung = next((r for r in range(3) if mass[r, q] >= threshold), 2)
      spent, good = spent + price[rung, q] / count, good + right[rung, q] / count
      rungs[rung] += 1
    assert row["rungs"] == "/".join(map(str, rungs))
    assert (row["flops"], row["accuracy"]) == (pytest.approx(spent), pytest.approx(good))
    prices, accuracies = price.mean(axis=1), right.mean(axis=1)
    upper = next(r for r in range(1, 4) if prices[r] >= spent)
    share = (spent - prices[upper - 1]) / (prices[upper] - prices[upper - 1])
    line = (1 - share) * accuracies[upper - 1] + share * accuracies[upper]
    assert row["accuracy_beyond_fixed"] == pytest.approx(good - line)
    assert row["accuracy_beyond_fixed_low"] < row["accuracy_beyond_fixed"] < row["accuracy_beyond_fixed_high"]
  cheapest = np.mean([price[next(r for r in range(4) if same[r, q] == 1), q] for q in range(count)])
  assert adaptive.cheapest(outcomes) == pytest.approx(cheapest)
  lines = adaptive.summary(fixed, adapted, cheapest)
  assert any(line.startswith(f"| 0.3 | {adapted[0]['rungs']} | {adapted[0]['flops']:.1%} |") for line in lines)
  assert any(line.startswith("| no pruning |") and line.endswith("| – | – |") for line in lines)
  figures.save(tmp_path / "adaptive.png", adaptive.plot(fixed, adapted))
  assert (tmp_path / "adaptive.png").stat().st_size > 10_000
