"""The study of adaptive keep counts: its rungs are those of the generator, its figures those of slow sums."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.adaptive import plots, study, tables
from experiments.adaptive.study import Outcomes
from experiments.flow.subject import Subject
from experiments.question_sets import Question
from himap_jax import flops
from himap_jax.adaptive import Ladder, assign
from himap_jax.adaptive_generation import AdaptiveGenerator
from himap_jax.llava import Llava
from himap_jax.methods import build_schedule
from himap_jax.processing import Processor
from himap_jax.schedule import Schedule

KEEPS = ((4, 2), (8, 3), (12, 6))
TEXTS = ("Why?", "Where is it?", "What?", "How many?", "Why?")
NEW = 3


def ladder(threshold):
  sizes = dict(num_layers=6, num_image_tokens=16, prune_layers=(2, 4))
  return Ladder(tuple(build_schedule("himap", **sizes, keep=keep) for keep in KEEPS), threshold)


@pytest.fixture(scope="module")
def measured(loaded, images, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("adaptive")
  model = loaded("clip_mha")
  for number, image in enumerate(images):
    image.save(workdir / f"{number}.png")
  questions = [Question(f"q{i}", workdir / f"{i % 4}.png", text, "x", "t", "") for i, text in enumerate(TEXTS)]
  studied = Subject(
    loaded=model,
    model=Llava(model.config, jnp.float32),
    processor=Processor(model.processor, model.config, template="<image>{question}", buckets=(24,), max_new_tokens=NEW),
    questions=questions,
    batch_size=2,
    seed=0,
    settings={},
  )
  yield studied, study.measure(studied, ladder(0.5).rungs, workdir, max_new_tokens=NEW), workdir
  jax.clear_caches()


def test_answers_and_rungs_are_those_of_the_generator(measured):
  studied, outcomes, workdir = measured
  threshold = float(np.sort(outcomes.mass[0])[2])  # some on the first rung, some above
  rungs = np.asarray(assign(jnp.asarray(outcomes.mass.T), threshold - 1e-6))
  assert len(set(rungs.tolist())) > 1
  generator = AdaptiveGenerator(
    studied.loaded, ladder(threshold - 1e-6), batch_size=2, num_batches=3, max_new_tokens=NEW
  )
  batches = list(studied.batches("test"))
  inputs = jax.tree.map(lambda *parts: np.concatenate(parts), *(batch.inputs for batch in batches))
  ids = [row_id for batch in batches for row_id in batch.row_ids]
  found = generator(inputs, ids)
  given = [json.loads((workdir / f"answers-{first}_{second}.json").read_text()) for first, second in KEEPS]
  for number, question in enumerate(studied.questions):
    row = ids.index(question.id)
    assert found.rungs[row] == rungs[number]
    assert studied.processor.decode(found.tokens[row]) == given[rungs[number]][question.id]


def test_prices_are_those_of_all_tokens(measured):
  studied, outcomes, _ = measured
  length = studied.example(studied.questions[1]).num_text_tokens
  for price, schedule in zip(outcomes.price, (*ladder(0.5).rungs, Schedule()), strict=True):
    own, plain = (flops.costs(studied.loaded.config, s, 16, length) for s in (schedule, Schedule()))
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
  outcomes = Outcomes(price, right, same, mass, list(KEEPS))
  fixed, adapted = tables.rows(outcomes, [ladder(0.3), ladder(0.7)], seed=0)
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
    costs, accuracies = price.mean(axis=1), right.mean(axis=1)
    upper = next(r for r in range(1, 4) if costs[r] >= spent)
    share = (spent - costs[upper - 1]) / (costs[upper] - costs[upper - 1])
    line = (1 - share) * accuracies[upper - 1] + share * accuracies[upper]
    assert row["accuracy_beyond_fixed"] == pytest.approx(good - line)
    assert row["accuracy_beyond_fixed_low"] < row["accuracy_beyond_fixed"] < row["accuracy_beyond_fixed_high"]
  cheapest = np.mean([price[next(r for r in range(4) if same[r, q] == 1), q] for q in range(count)])
  assert tables.cheapest(outcomes) == pytest.approx(cheapest)
  tables.write_markdown(tmp_path / "adaptive.md", fixed, adapted, "heading", cheapest)
  assert f"| 0.3 | {adapted[0]['rungs']} | {adapted[0]['flops']:.1%} |" in (tmp_path / "adaptive.md").read_text()
  plots.plot(tmp_path / "adaptive.png", fixed, adapted)
  assert (tmp_path / "adaptive.png").stat().st_size > 10_000
