"""The grid of a comparison: schedules of a given mean number of image tokens, cells, and what cannot be one."""

import jax
import numpy as np
import pytest

from experiments.compare.grid import Shape, check_any, make_cells, schedule_for_budget
from himap_jax.engine.batching import Batcher, Bucket, ImageBucket
from himap_jax.engine.prefill import Context, prune, start
from himap_jax.errors import UserError
from himap_jax.pruning import methods
from himap_jax.pruning.config import PruningConfig

NAME, N, NUM_LAYERS = "clip_mha", 16, 6
PRUNING = [name for name, method in methods.METHODS.items() if name != "none" and not method.freezes]
BUDGETS = (288.0, 192.0, 128.0, 64.0, 32.0, 7.5)


@pytest.fixture(scope="module")
def prompt(loaded, images):
  """A batch of one prompt."""
  processor = loaded(NAME).prompts()
  batcher = Batcher(512, processor.blank, [ImageBucket(1, processor.num_image_tokens)])
  return batcher.pack(
    [processor.prepare([images[0]], "What?")], bucket=Bucket(1, processor.num_image_tokens, 64), batch_size=1
  )


def scaled(method, budget, shape, *, prune_layers=None, ranking=None):
  return schedule_for_budget(PruningConfig(method, prune_layers), budget, shape, ranking)


def entering(schedule, num_layers, num_image_tokens):
  """Image tokens that enter each layer, from the stages alone."""
  stages = {stage.layer: stage.keep for stage in schedule.stages}
  counts = [num_image_tokens]
  for layer in range(num_layers):
    counts.append(stages.get(layer, counts[-1]))
  return counts[1:]


def reachable_means(keep, layers, num_layers, num_image_tokens):
  """The means of all factors: between two of these no count changes."""
  breaks = np.unique([(count + 0.5) / own for own in keep for count in range(num_image_tokens)])
  factors = np.concatenate([[0.0], (breaks[1:] + breaks[:-1]) / 2, breaks[-1:] + 1])
  counts = np.clip(np.round(factors[:, None] * np.array(keep)), 1, num_image_tokens)
  return (layers[0] * num_image_tokens + counts @ np.diff([*layers, num_layers])) / num_layers


@pytest.mark.parametrize("method", [*PRUNING, "divprune+himap", "visionzip+pyramiddrop"])
@pytest.mark.parametrize("num_layers", [30, 32])
def test_budget_is_as_near_as_brute_force_comes(method, num_layers):
  shape = Shape(num_layers, 576)
  own = PruningConfig(method).schedule(*shape)
  layers, keep = [s.layer for s in own.stages], [s.keep for s in own.stages]
  means = reachable_means(keep, layers, num_layers, 576)
  lowest = (layers[0] * 576 + num_layers - layers[0]) / num_layers
  for budget in BUDGETS:
    if lowest > budget:
      with pytest.raises(ValueError, match=f"lowest mean reachable is {lowest:.1f}"):
        scaled(method, budget, shape)
      continue
    schedule = scaled(method, budget, shape)
    counts = [stage.keep for stage in schedule.stages]
    error = abs(np.mean(entering(schedule, num_layers, 576)) - budget)
    assert error <= np.abs(means - budget).min() + 1e-9
    assert counts[-1] in (1, [576, *counts][-2]) or error <= (num_layers - layers[-1]) / num_layers / 2 + 1e-9
    assert [stage.layer for stage in schedule.stages] == layers
    assert [stage.criterion for stage in schedule.stages] == [stage.criterion for stage in own.stages]
    bounds = [((c - 0.5) / k, (c + 0.5) / k) for c, k in zip(counts[:-1], keep, strict=False) if 1 < c < 576]
    assert max((low for low, _ in bounds), default=-np.inf) <= min((high for _, high in bounds), default=np.inf) + 1e-9


def test_budget_of_own_layers():
  shape = Shape(30, 576)
  schedule = scaled("himap", 32, shape, prune_layers=(1, 4))
  assert [stage.layer for stage in schedule.stages] == [1, 4]
  assert abs(np.mean(entering(schedule, 30, 576)) - 32) <= 26 / 60
  assert scaled("random", 576, shape).stages[0].keep == 576
  for budget in (0, -3, 577):
    with pytest.raises(ValueError, match="above 0 and at most the image's 576 tokens"):
      scaled("random", budget, shape)
  with pytest.raises(ValueError, match="class token"):
    scaled("fastervlm", 64, shape._replace(provides=frozenset()))


@pytest.mark.parametrize("num_layers", [30, 32])
def test_budget_of_frozen_layers(num_layers):
  shape = Shape(num_layers, 576)
  ranking = np.random.default_rng(0).permutation(num_layers).tolist()
  for budget in BUDGETS:
    schedule = scaled("shortv", budget, shape, ranking=ranking)
    count = len(schedule.frozen_layers)
    assert set(schedule.frozen_layers) == set(ranking[:count])
    means = [576 * (num_layers - frozen) / num_layers for frozen in range(num_layers + 1)]
    assert abs(means[count] - budget) == min(abs(mean - budget) for mean in means)
  with pytest.raises(ValueError, match="--shortv_ranking"):
    scaled("shortv", 64, shape)
  with pytest.raises(ValueError, match="names 3 layers; the lowest mean"):
    scaled("shortv", 64, shape, ranking=ranking[:3])


@pytest.mark.sampled
@pytest.mark.parametrize("method", [name for name in PRUNING if methods.METHODS[name].prune_layers == (0,)])
def test_methods_take_the_extreme_counts(loaded, prompt, method):
  budgets = (1, 2, N - 1, N)

  def kept(model, inputs, keys):
    """What the stage before the decoder keeps at each budget."""
    network = model.bind()
    embedded = network.embed(inputs)
    schedules = [scaled(method, budget, Shape(NUM_LAYERS, N)) for budget in budgets]
    stages, context = [schedule.stages[0] for schedule in schedules], Context(keys, embedded)
    return [prune(network, stage, start(embedded), None, context)[0].layout.original() for stage in stages]

  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
  results = jax.eval_shape(kept, loaded(NAME).model, prompt, keys)
  assert [result.shape for result in results] == [(1, budget) for budget in budgets]


def make(*, names=(), budgets=(), settings=(), ranking=None):
  return make_cells(Shape(30, 576), names, budgets, settings, ranking)


def test_cells():
  cells = make(
    names=["none", "himap", "himap@1/4", "shortv"], budgets=[64, 32], settings=["himap@2/8:288/72", "fastv:25%"]
  )
  assert [cell.label for cell in cells] == [
    "none", "himap 64", "himap 32", "himap@1/4 64", "himap@1/4 32", "shortv 64", "shortv 32", "himap@2/8:288/72", "fastv:25%"
  ]  # fmt: skip
  by_label = {cell.label: cell for cell in cells}
  assert "lowest mean reachable is 39.3" in by_label["himap 32"].note and by_label["himap 32"].schedule is None
  assert "--shortv_ranking" in by_label["shortv 64"].note
  assert [(s.layer, s.keep) for s in by_label["himap@2/8:288/72"].schedule.stages] == [(2, 288), (8, 72)]
  assert [(s.layer, s.keep) for s in by_label["fastv:25%"].schedule.stages] == [(2, 144)]
  assert by_label["himap@1/4 32"].note is None
  names = [cell.file_name for cell in cells if cell.schedule is not None]
  assert len(set(names)) == len(names) and not any("/" in name for name in names)
  with_layers = make(names=["shortv@1/2"], budgets=[64], ranking=range(30))[1]
  assert with_layers.schedule is None and "takes its layers from their ranking" in with_layers.note
  ranked = [make(names=["shortv"], budgets=[64], ranking=order)[1] for order in (range(30), range(29, -1, -1))]
  assert ranked[0].file_name != ranked[1].file_name


def test_cells_with_restore():
  cells = make(
    names=["himap", "himap+restore", "divprune+himap+restore@0/1/4", "shortv+restore"],
    budgets=[64],
    settings=["himap+restore@2/8:288/72", "fastv+restore:25%"],
  )
  by_label = {cell.label: cell for cell in cells}
  assert not any(cell.uses_chance for cell in cells)
  assert list(by_label)[1:] == [
    "himap 64", "himap+restore 64", "divprune+himap+restore@0/1/4 64", "shortv+restore 64", "himap+restore@2/8:288/72",
    "fastv+restore:25%",
  ]  # fmt: skip
  plain, restored = by_label["himap 64"].schedule, by_label["himap+restore 64"].schedule
  assert restored.restore and not plain.restore and restored.stages == plain.stages
  assert by_label["himap 64"].file_name != by_label["himap+restore 64"].file_name
  assert [stage.layer for stage in by_label["divprune+himap+restore@0/1/4 64"].schedule.stages] == [0, 1, 4]
  own = by_label["himap+restore@2/8:288/72"].schedule
  assert own.restore and [(s.layer, s.keep) for s in own.stages] == [(2, 288), (8, 72)]
  assert by_label["shortv+restore 64"].schedule is None
  ranked = make(names=["shortv+restore"], budgets=[64], ranking=range(30))[1]
  assert "removes none" in ranked.note


def test_cells_that_keep_positions():
  plain, own = make(names=["divprune", "divprune+positions"], budgets=[64])[1:]
  assert own.schedule.keep_positions and not plain.schedule.keep_positions
  assert own.schedule.stages == plain.schedule.stages and own.file_name != plain.file_name
  assert "keeps them" in make(names=["himap+positions"], budgets=[64])[1].note
  assert make(settings=["divprune+positions:64"])[1].schedule == own.schedule


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"settings": ["none+restore"]}, "removes none"),
    ({"names": ["himap@2/8+restore"]}, "is not a method"),
    ({"names": ["himap:288"]}, "'himap:288' is not a method"),
    ({"names": ["himapp"]}, "unknown method 'himapp'"),
    ({"settings": ["himap@2,8"]}, "is not a method"),
    ({"settings": ["himap@2/8:288"]}, "2 stages"),
    ({"settings": ["himap@2/40:288/72"]}, "before layer 40"),
    ({"settings": ["fastv:1.5"]}, "'fastv:1.5'"),
    ({"budgets": [64, -5]}, "a budget must be above 0, not -5"),
    ({"budgets": [float("nan")]}, "a budget must be above 0, not nan"),
    ({"budgets": [9999], "settings": ["himap@2/40:288/72"]}, "before layer 40"),
    ({"budgets": [9999]}, "a budget must be at most the image's 576 tokens, not 9999"),
  ],
)
def test_cells_that_cannot_be(changes, message):
  with pytest.raises(ValueError, match=message):
    make(**{"budgets": [64]} | changes)


def test_a_grid_without_anything_to_compare_is_refused():
  with pytest.raises(UserError, match="himap 32: .*pyramiddrop 32: "):
    check_any(make(names=["himap", "pyramiddrop"], budgets=[32]))
  with pytest.raises(UserError, match="no method is compared with none"):
    check_any(make(names=["none"], budgets=[64]))
