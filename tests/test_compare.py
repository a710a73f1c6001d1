"""The comparison of pruning methods: budgets, statistics, question sets, and a study from its flags to its tables."""

import collections
import csv
import dataclasses
import itertools
import json
import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

import himap_jax
from experiments import question_sets
from experiments.compare import examples, plots, strips, study, tables, timing
from experiments.compare.budget import schedule_for_budget
from experiments.compare.grid import Cell, make_cells
from experiments.compare.report import Example, Shown
from experiments.compare.runner import OutputWriter
from experiments.compare.study import StudyConfig
from experiments.question_sets import Question, is_right
from experiments.statistics import accuracy_by_type, interval, pareto_front, resample
from himap_jax import flops, methods
from himap_jax.llava import Inputs, Llava
from himap_jax.prefill import prefill

ROOT = pathlib.Path(__file__).parents[1]
NAME, N, NUM_LAYERS = "clip_mha", 16, 6
PRUNING = [name for name, method in methods.METHODS.items() if name != "none" and not method.freezes]
METHODS_DRAWN = [*PRUNING, "shortv", "himap@1/4", "himap@2/4", *(f"{name}+himap" for name in ("divprune", "vispruner"))]
BUDGETS = (288.0, 192.0, 128.0, 64.0, 32.0, 7.5)


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
  sizes = {"num_layers": num_layers, "num_image_tokens": 576}
  own = methods.build_schedule(method, **sizes)
  layers, keep = [s.layer for s in own.stages], [s.keep for s in own.stages]
  means = reachable_means(keep, layers, num_layers, 576)
  lowest = (layers[0] * 576 + num_layers - layers[0]) / num_layers
  for budget in BUDGETS:
    if lowest > budget:
      with pytest.raises(ValueError, match=f"lowest mean reachable is {lowest:.1f}"):
        schedule_for_budget(method, budget, **sizes)
      continue
    schedule = schedule_for_budget(method, budget, **sizes)
    counts = [stage.keep for stage in schedule.stages]
    error = abs(np.mean(entering(schedule, num_layers, 576)) - budget)
    assert error <= np.abs(means - budget).min() + 1e-9
    assert counts[-1] in (1, [576, *counts][-2]) or error <= (num_layers - layers[-1]) / num_layers / 2 + 1e-9
    assert [stage.layer for stage in schedule.stages] == layers
    assert [stage.criterion for stage in schedule.stages] == [stage.criterion for stage in own.stages]
    bounds = [((c - 0.5) / k, (c + 0.5) / k) for c, k in zip(counts[:-1], keep, strict=False) if 1 < c < 576]
    assert max((low for low, _ in bounds), default=-np.inf) <= min((high for _, high in bounds), default=np.inf) + 1e-9


def test_budget_of_own_layers():
  sizes = {"num_layers": 30, "num_image_tokens": 576}
  schedule = schedule_for_budget("himap", 32, **sizes, prune_layers=(1, 4))
  assert [stage.layer for stage in schedule.stages] == [1, 4]
  assert abs(np.mean(entering(schedule, 30, 576)) - 32) <= 26 / 60
  assert schedule_for_budget("random", 576, **sizes).stages[0].keep == 576
  for budget in (0, -3, 577):
    with pytest.raises(ValueError, match="above 0 and at most the image's 576 tokens"):
      schedule_for_budget("random", budget, **sizes)
  with pytest.raises(ValueError, match="class token"):
    schedule_for_budget("fastervlm", 64, **sizes, has_class_token=False)


@pytest.mark.parametrize("num_layers", [30, 32])
def test_budget_of_frozen_layers(num_layers):
  sizes = {"num_layers": num_layers, "num_image_tokens": 576}
  ranking = np.random.default_rng(0).permutation(num_layers).tolist()
  for budget in BUDGETS:
    schedule = schedule_for_budget("shortv", budget, **sizes, ranking=ranking)
    count = len(schedule.frozen_layers)
    assert set(schedule.frozen_layers) == set(ranking[:count])
    means = [576 * (num_layers - frozen) / num_layers for frozen in range(num_layers + 1)]
    assert abs(means[count] - budget) == min(abs(mean - budget) for mean in means)
  with pytest.raises(ValueError, match="--shortv_ranking"):
    schedule_for_budget("shortv", 64, **sizes)
  with pytest.raises(ValueError, match="names 3 layers; the lowest mean"):
    schedule_for_budget("shortv", 64, **sizes, ranking=ranking[:3])


@pytest.mark.parametrize("method", [name for name in PRUNING if methods.METHODS[name].prune_layers == (0,)])
def test_methods_take_the_extreme_counts(loaded, method):
  model = loaded(NAME)
  shapes = Inputs(
    tokens=jax.ShapeDtypeStruct((1, N + 9), np.int32),
    length=jax.ShapeDtypeStruct((1,), np.int32),
    image_start=jax.ShapeDtypeStruct((1,), np.int32),
    pixel_values=jax.ShapeDtypeStruct((1, 3, 28, 28), np.float32),
  )
  for budget in (1, 2, N - 1, N):
    schedule = schedule_for_budget(method, budget, num_layers=NUM_LAYERS, num_image_tokens=N)
    result = jax.eval_shape(
      lambda params, inputs, keys, schedule=schedule: prefill(
        Llava(model.config, np.float32), params, inputs, keys, schedule
      ),
      model.params,
      shapes,
      jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1)),
    )
    assert result.kept[0].shape == (1, budget)


def make(*, names=(), budgets=(), settings=(), **changes):
  sizes = {"num_layers": 30, "num_image_tokens": 576, "has_class_token": True, "ranking": None} | changes
  return make_cells(names, budgets, settings, **sizes)


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
  assert by_label["himap@1/4 32"].family == "himap" and by_label["himap@1/4 32"].note is None
  names = [cell.file_name for cell in cells if cell.schedule is not None]
  assert len(set(names)) == len(names) and not any("/" in name for name in names)
  with_layers = make(names=["shortv@1/2"], budgets=[64], ranking=range(30))[1]
  assert with_layers.schedule is None and "takes its layers from their ranking" in with_layers.note
  ranked = [make(names=["shortv"], budgets=[64], ranking=order)[1] for order in (range(30), range(29, -1, -1))]
  assert ranked[0].file_name != ranked[1].file_name


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"names": ["himap:288"]}, "'himap:288' is not a method"),
    ({"names": ["himapp"]}, "unknown method 'himapp'"),
    ({"settings": ["himap@2,8"]}, "is not a method"),
    ({"settings": ["himap@2/8:288"]}, "2 stages"),
    ({"settings": ["himap@2/40:288/72"]}, "before layer 40"),
    ({"settings": ["fastv:1.5"]}, "'fastv:1.5'"),
  ],
)
def test_cells_that_cannot_be(changes, message):
  with pytest.raises(ValueError, match=message):
    make(**{"budgets": [64]} | changes)


def exact_quantiles(steps, num_questions):
  """Quantiles of a mean of resampled values out of -1, 0, 1, by convolution of their exact distribution."""
  one = np.array([np.mean(steps == value) for value in (-1, 0, 1)])
  total = np.ones(1)
  for _ in range(num_questions):
    total = np.convolve(total, one)
  values = np.arange(-num_questions, num_questions + 1) / num_questions
  return [values[np.searchsorted(np.cumsum(total), level)] for level in (0.025, 0.975)]


def test_bootstrap_against_exact_distributions():
  rng = np.random.default_rng(0)
  reference = rng.random(90) < 0.8
  right = np.stack([reference, reference, reference ^ (rng.random(90) < 0.2), rng.random(90) < 0.5, np.zeros(90, bool)])
  accuracy = resample(right, seed=3)
  for index, row in enumerate(right):
    step = 1 / len(row)
    exact = exact_quantiles(row.astype(int), len(row))
    np.testing.assert_allclose(interval(accuracy[:, index]), exact, atol=1.01 * step)
    exact = exact_quantiles(row.astype(int) - reference.astype(int), len(row))
    np.testing.assert_allclose(interval(accuracy[:, index] - accuracy[:, 0]), exact, atol=1.01 * step)
  np.testing.assert_array_equal(accuracy[:, 1], accuracy[:, 0])
  np.testing.assert_array_equal(accuracy[:, 4], 0.0)
  np.testing.assert_array_equal(resample(right, seed=3), accuracy)
  assert not np.array_equal(resample(right, seed=4, resamples=30), accuracy[:30])


def test_accuracy_by_type():
  right = np.array([[True, False, True, True], [False, False, False, True]])
  found = accuracy_by_type(right, ["b", "a", "b", "a"])
  assert list(found) == ["b", "a"]
  np.testing.assert_array_equal(found["b"], [1.0, 0.0])
  np.testing.assert_array_equal(found["a"], [0.5, 0.5])


def test_pareto_front_against_all_pairs():
  rng = np.random.default_rng(0)
  for _ in range(300):
    costs, values = rng.integers(0, 6, (2, rng.integers(1, 12))).tolist()
    expected = {
      i
      for i in range(len(costs))
      if not any(
        costs[j] <= costs[i] and values[j] >= values[i] and (costs[j], values[j]) != (costs[i], values[i])
        for j in range(len(costs))
      )
    }
    front = pareto_front(costs, values)
    assert set(front) == expected and len(front) == len(expected)
    assert [costs[i] for i in front] == sorted(costs[i] for i in front)


def question(index, type="t", text="q", answer="a", guess=""):
  return Question(str(index), pathlib.Path(f"{index}.png"), text, answer, type, guess)


def test_results_belong_to_questions_and_pictures(tmp_path):
  path = tmp_path / "a.png"
  path.write_bytes(b"one")
  asked = [Question("a", path, "Why?", "x", "why", ""), Question("b", tmp_path / "b.png", "Why?", "x", "why", "")]
  first = question_sets.digest(asked)
  assert first == question_sets.digest(asked)
  assert first != question_sets.digest(asked[:1])
  assert first != question_sets.digest([asked[0], asked[1]._replace(question="Who?")])
  path.write_bytes(b"other")
  other = question_sets.digest(asked)
  (tmp_path / "b.png").write_bytes(b"repaired")
  assert len({first, other, question_sets.digest(asked)}) == 3


def test_draw_keeps_proportions_and_order():
  questions = [question(i, type="abbcccdddd"[i % 10]) for i in range(200)]
  drawn = question_sets.draw(questions, 50, seed=0)
  assert collections.Counter(q.type for q in drawn) == {"a": 5, "b": 10, "c": 15, "d": 20}
  assert [int(q.id) for q in drawn] == sorted(int(q.id) for q in drawn)
  assert drawn == question_sets.draw(questions, 50, seed=0) != question_sets.draw(questions, 50, seed=1)
  for count in (1, 7, 33, 199):
    assert len(question_sets.draw(questions, count, seed=0)) == count
  assert question_sets.draw(questions, 900, seed=0) == questions


def test_guesses_against_a_slow_loop():
  rng = np.random.default_rng(0)
  asked = [(i // 3, f"q{rng.integers(9)}", f"t{rng.integers(3)}", f"a{rng.integers(4)}") for i in range(60)]
  asked.append((0, "x", "y", "z"))
  for index, guess in enumerate(question_sets.guess_from_other_half(asked)):
    others = [other for other in asked if (other[0] - asked[index][0]) % 2]
    for field in (1, 2):
      counts = collections.Counter(other[3] for other in others if other[field] == asked[index][field])
      if counts:
        assert counts[guess] == max(counts.values())
        break
    else:
      assert guess == ""


def test_a_balanced_set_is_guessed_as_often_as_it_should_be():
  answers = np.random.default_rng(0).permutation(["yes", "no"] * 200).tolist()
  asked = [(index, f"question {index}", "yes or no", answer) for index, answer in enumerate(answers)]
  guesses = question_sets.guess_from_other_half(asked)
  assert 0.4 < np.mean([guess == answer for guess, answer in zip(guesses, answers, strict=True)]) < 0.6


@pytest.mark.parametrize("answer, truth, expected", [
  (" Red. ", "red", True), ("red", "Red.", True), ("red..", "red", False), ("reddish", "red", False), ("", ".", True), (None, "red", False), (None, None, False),
])  # fmt: skip
def test_is_right(answer, truth, expected):
  assert is_right(answer, truth) == expected


@pytest.mark.parametrize("answer, truth", [
  ("a, b, c", "a, b, c"), ("A,b.", "a, b, c"), ("c, b, a", "a, b, c"), ("b, a, b, c", "a, b, b"), ("x", "a, b"), ("a, b", "a"), ("", "a"), ("red", "Red."),
])  # fmt: skip
def test_lists_are_scored_by_what_they_share_in_order(answer, truth):
  given, wanted = ([item.strip(" .").lower() for item in text.split(",")] for text in (answer, truth))

  def ordered(items):
    return {part for size in range(len(items) + 1) for part in itertools.combinations(items, size)}

  longest = max(map(len, ordered(given) & ordered(wanted)))
  precision, recall = longest / len(given), longest / len(wanted)
  expected = 2 * precision * recall / (precision + recall) if longest else 0.0
  assert question_sets.score(answer, truth) == pytest.approx(expected)
  assert question_sets.score(None, truth) == question_sets.score(answer, None) == 0


def test_question_files(tmp_path):
  path = tmp_path / "questions.jsonl"
  rows = [
    {"id": 1, "image": "a.png", "question": "q", "answer": "x", "type": "t"},
    {"id": 2, "image": "a.png", "question": "q", "answer": "y", "type": "t"},
    {"id": 3, "image": "b.png", "question": "q", "answer": "y", "type": "t", "guess": "z"},
  ]
  load = lambda: question_sets.load(str(path), num_questions=None, seed=0, workdir=tmp_path)  # noqa: E731
  write_rows(path, rows)
  loaded = load()
  assert [q.guess for q in loaded] == ["y", "y", "z"]
  assert loaded[0].id == "1" and loaded[0].image == tmp_path / "a.png"
  for bad, message in (([rows[0], {"id": 4}], "line 2"), ([rows[0], rows[0]], "share an id"), ([], "no questions")):
    write_rows(path, bad)
    with pytest.raises(ValueError, match=message):
      load()
  with pytest.raises(ValueError, match="neither a question set"):
    question_sets.load("nowhere", num_questions=None, seed=0, workdir=tmp_path)


def write_rows(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_rows(path):
  return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Killed(BaseException):
  """Stands for a signal."""


@pytest.fixture(scope="module")
def config(loaded, images, tmp_path_factory):
  """Nine questions; the picture of the first is missing, and of the others every second truth is the model's own answer."""
  folder = tmp_path_factory.mktemp("compare")
  rows = [{"id": "bad", "image": "9.png", "question": "what 0?", "type": "what", "answer": "yes"}]
  for index, image in enumerate(images):
    image.save(folder / f"{index}.png")
    for type in ("what", "why"):
      row = {"id": f"{index}{type}", "image": f"{index}.png", "question": f"{type} {index % 2}?", "type": type}
      rows.append(row | {"answer": "yes"})
  answers = himap_jax.generate(
    loaded(NAME),
    [images[int(row["image"][0])] for row in rows[1::2]],
    [row["question"] for row in rows[1::2]],
    max_new_tokens=3,
    prompt_template="<image>{question}",
    prompt_buckets=(40,),
    batch_size=1,
  )
  rows[1::2] = [row | {"answer": answer.text} for row, answer in zip(rows[1::2], answers, strict=True)]
  write_rows(folder / "questions.jsonl", rows)
  return StudyConfig(
    checkpoint=str(loaded(NAME).directory),
    dtype="float32",
    question_set=str(folder / "questions.jsonl"),
    num_questions=9,
    seed=0,
    methods=("himap@2/4", "fastervlm"),
    budgets=(8.0, 5.0),
    settings=(),
    shortv_ranking=None,
    max_new_tokens=3,
    batch_size=2,
    prompt_buckets=(40,),
    prompt_template="<image>{question}",
    timing_batch_size=1,
    timing_new_tokens=2,
    timing_repeats=1,
    num_examples=3,
    num_strips=2,
    workdir=folder / "work",
    output=folder / "output",
    compilation_cache_dir="",
  )


@pytest.fixture(scope="module")
def rows(config):
  """A study that was killed in its second cell, with a torn row, and ran to its end at the second start."""
  write, count = OutputWriter.write, itertools.count()
  with pytest.MonkeyPatch.context() as patch:

    def dying(self, rows):
      if next(count) == 6:
        raise Killed
      write(self, rows)

    patch.setattr(OutputWriter, "write", dying)
    with pytest.raises(Killed):
      study.run(config)
  answers = sorted((config.workdir / "answers").iterdir(), key=lambda path: path.stat().st_mtime_ns)
  assert [len(read_rows(path)) for path in answers] == [9, 5]
  with open(answers[1], "a", encoding="utf-8") as file:
    file.write('{"id": "0wh')
  return {row["label"]: row for row in study.run(config)}


def questions_of(config):
  return question_sets.load(
    config.question_set, num_questions=config.num_questions, seed=config.seed, workdir=config.workdir
  )


def test_every_question_is_answered_once(config, rows):
  ids = [q.id for q in questions_of(config)]
  files = list((config.workdir / "answers").iterdir())
  assert len(files) == 4
  for path in files:
    assert sorted(row["id"] for row in read_rows(path)) == sorted(ids)


def test_rows_equal_what_the_answers_say(config, rows):
  assert list(rows) == ["none", "question only", "himap@2/4 8", "himap@2/4 5", "fastervlm 8", "fastervlm 5"]
  questions = questions_of(config)
  given = {
    label: {row["id"]: row for row in read_rows(path)}
    for label in rows
    for path in (config.workdir / "answers").glob(f"{label.replace('/', '-').replace(' ', '-')}.*")
  }
  assert set(given) == {"none", "himap@2/4 8", "fastervlm 8", "fastervlm 5"}
  for label, own in given.items():
    right = {q.id: is_right(own[q.id]["answer"], q.answer) for q in questions}
    row = rows[label]
    assert row["accuracy"] == pytest.approx(np.mean(list(right.values())))
    for type in ("what", "why"):
      assert row[f"accuracy: {type}"] == pytest.approx(np.mean([right[q.id] for q in questions if q.type == type]))
    same = [is_right(own[q.id]["answer"], given["none"][q.id]["answer"]) for q in questions]
    assert row["agreement"] == pytest.approx(np.mean(same))
    assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
    assert row["errors"] == 1 and row["questions"] == 9
    kept = [N] * NUM_LAYERS
    for layer, count in (
      zip(map(int, (row["prune_layers"] or "").split("/")), row["keep"].split("/"), strict=True) if row["keep"] else ()
    ):
      kept[layer:] = [int(count)] * (NUM_LAYERS - layer)
    assert row["tokens_in"] == pytest.approx(np.mean(kept))
    assert row["tokens_out"] == pytest.approx(np.mean([*kept[1:], kept[-1]]))
    d, m = 48, 96
    eq10 = [sum(4 * n * d * d + 2 * n * n * d + 2 * n * d * m for n in counts) for counts in (kept, [N] * NUM_LAYERS)]
    assert row["image_token_flops"] == pytest.approx(eq10[0] / eq10[1])
    lengths = [len(stage) for stage in own[questions[1].id]["kept"]]
    assert lengths == [int(count) for count in (row["keep"] or "").split("/") if count]
    (timing,) = (config.workdir / "timings").glob(f"{label.replace('/', '-').replace(' ', '-')}.*.json")
    measured = json.loads(timing.read_text())
    assert row["prefill_time"] == measured["prefill_ratio"] > 0 and row["decode_time"] == measured["decode_ratio"] > 0
  assert rows["none"]["accuracy"] >= 4 / 9 and rows["none"]["agreement"] == 8 / 9 and rows["none"]["difference"] == 0
  for label in given:
    assert rows[label]["difference"] == pytest.approx(rows[label]["accuracy"] - rows["none"]["accuracy"])
  guessed = [is_right(q.guess, q.answer) for q in questions]
  assert rows["question only"]["accuracy"] == pytest.approx(np.mean(guessed))


def test_methods_are_held_against_random_at_their_budget(loaded, tmp_path):
  sizes = {"num_layers": NUM_LAYERS, "num_image_tokens": N}
  names = (("random", 8), ("himap", 8), ("fastv", 8), ("himap", 2), ("random", 2), ("fastv", 2))
  cells = [Cell("none", "none", schedule=methods.build_schedule("none", **sizes))]
  for name, budget in names:
    schedule = methods.build_schedule(name, **sizes, prune_layers=(2, 4) if name == "himap" else (2,), keep=None)
    cells.append(Cell(name, f"{name} {budget}", float(budget), None if (name, budget) == ("fastv", 2) else schedule))
  questions = [question(i, type="ab"[i % 2])._replace(answer="yes", guess="no") for i in range(4)]
  right = {"none": 4, "random 8": 2, "himap 8": 3, "fastv 8": 1, "himap 2": 2, "random 2": 0}
  answers = {
    label: {q.id: {"answer": "yes" if i < count else "no"} for i, q in enumerate(questions)}
    for label, count in right.items()
  }
  rows = tables.make_rows(
    cells, answers, {key: {} for key in answers}, questions, loaded(NAME).config,
    num_image_tokens=N, num_text_tokens=10, bytes_per_value=2, seed=0,
  )  # fmt: skip
  by_label = {row["label"]: row for row in rows}
  beyond = {label: row["beyond_random"] for label, row in by_label.items() if "beyond_random" in row}
  assert beyond == {"random 8": 0.0, "himap 8": 0.25, "fastv 8": -0.25, "himap 2": 0.5, "random 2": 0.0}
  assert (by_label["himap 8"]["beyond_random_low"], by_label["himap 8"]["beyond_random_high"]) == (0.0, 0.75)
  tables.write_markdown(tmp_path / "table.md", rows)
  assert "| +25.0% | +0.0% to +75.0% |" in (tmp_path / "table.md").read_text()
  tables.write_types(tmp_path / "types.md", rows)
  assert (tmp_path / "types.md").read_text().splitlines() == [
    "| budget |  | a | b |",
    "| --- | --- | --- | --- |",
    "|  | none | 100.0% | 100.0% |",
    "|  | question only | 0.0% | 0.0% |",
    "| 8 | mean of 1 methods | 100.0% | 50.0% |",
    "| 8 | random | 50.0% | 50.0% |",
    "| 2 | mean of 1 methods | 50.0% | 50.0% |",
    "| 2 | random | 0.0% | 0.0% |",
  ]


def test_figures_of_a_cell(loaded):
  config = loaded(NAME).config
  sizes = {"num_layers": NUM_LAYERS, "num_image_tokens": N}
  cells = [
    Cell("none", "none", schedule=methods.build_schedule("none", **sizes)),
    Cell("himap@2/4", "himap", schedule=methods.build_schedule("himap", **sizes, prune_layers=(2, 4), keep=(8, 3))),
    Cell("shortv", "shortv", schedule=methods.build_schedule("shortv", **sizes, prune_layers=(1, 3, 5))),
  ]
  questions = [question(i, type="ab"[i % 2])._replace(answer="yes", guess="no") for i in range(4)]
  given = {
    "none": ["yes", "yes", "yes", "no"],
    "himap": ["Yes.", "no", "no", None],
    "shortv": ["yes", "yes", "no", "no"],
  }
  answers = {label: {q.id: {"answer": a} for q, a in zip(questions, own, strict=True)} for label, own in given.items()}
  timing = {
    "prefill_ratio": 0.5,
    "decode_ratio": 0.25,
    "prefill_seconds": 3.0,
    "decode_seconds": 4.0,
    "compile_seconds": 5.0,
  }
  rows = tables.make_rows(
    cells, answers, {"none": {}, "himap": timing, "shortv": {}}, questions, config,
    num_image_tokens=N, num_text_tokens=10, bytes_per_value=2, seed=0,
  )  # fmt: skip
  by_label = {row["label"]: row for row in rows}
  assert list(by_label) == ["none", "question only", "himap", "shortv"]
  expected = {
    "none": (0.75, 0.0, 1.0, 0), "question only": (0.0, -0.75, 0.25, 0), "himap": (0.25, -0.5, 0.25, 1), "shortv": (0.5, -0.25, 0.75, 0)
  }  # fmt: skip
  for label, (accuracy, difference, agreement, errors) in expected.items():
    row = by_label[label]
    assert (row["accuracy"], row["difference"], row["agreement"], row["errors"]) == (
      accuracy,
      difference,
      agreement,
      errors,
    )
  assert [by_label["himap"][f"accuracy: {type}"] for type in "ab"] == [0.5, 0.0]
  d, m = 48, 96

  def layers(counts):  # attention and SwiGLU of a LLaMA layer, multi-head
    return sum(4 * n * d * d + 2 * n * n * d + 3 * n * d * m for n in counts)

  present = [N, N, 8, 8, 3, 3]
  scoring = 10 * (N + 10) * d + 8 * (8 + 10) * d
  whole, himap, shortv = layers([N + 10] * NUM_LAYERS), by_label["himap"], by_label["shortv"]
  assert himap["all_token_flops"] == pytest.approx((layers([n + 10 for n in present]) + scoring) / whole)
  assert himap["scoring_share"] == pytest.approx(scoring / flops.costs(config, cells[1].schedule, N, 10).prefill)
  assert himap["cache"] == pytest.approx(sum(n + 10 for n in present) / (NUM_LAYERS * (N + 10)))
  assert himap["cache_bytes"] == sum(n + 10 for n in present) * 2 * d * 2
  assert (himap["tokens_in"], himap["tokens_updated"]) == (np.mean(present), np.mean(present))
  assert (shortv["tokens_in"], shortv["tokens_updated"], shortv["cache"]) == (N, N / 2, 1.0)
  assert (himap["prefill_time"], himap["decode_time"], himap["compile_seconds"]) == (0.5, 0.25, 5.0)
  assert by_label["none"]["prefill_time"] is None
  assert [column.label for column in tables.readable_columns(rows)].count("errors") == 1


class Clock:
  """Stands for a generator whose n-th run takes `seconds[n]` in prefill and twice that in decoding."""

  compile_seconds = 7.0

  def __init__(self, *seconds):
    self.seconds = iter(seconds)

  def __call__(self, inputs, ids):
    seconds = next(self.seconds)
    return SimpleNamespace(prefill_seconds=seconds, decode_seconds=2 * seconds)


def test_times_are_medians_of_ratios_without_the_first_run():
  inputs = SimpleNamespace(length=np.array([3]))
  measured = timing.measure(Clock(99.0, 2.0, 4.0, 10.0), Clock(50.0, 1.0, 3.0, 1.0), inputs, repeats=3)
  assert measured["prefill_ratio"] == measured["decode_ratio"] == 0.5
  assert (measured["prefill_seconds"], measured["decode_seconds"], measured["compile_seconds"]) == (1.0, 2.0, 7.0)


def test_a_budget_that_cannot_be_reached_is_a_row(config, rows):
  row = rows["himap@2/4 5"]
  assert row["note"] == "the lowest mean reachable is 6.0 tokens" and "accuracy" not in row
  markdown = (config.output / "table.md").read_text(encoding="utf-8")
  assert "| himap@2/4 | 5 | the lowest mean reachable is 6.0 tokens |" in markdown


def test_outputs(config, rows):
  with open(config.output / "table.csv", encoding="utf-8") as file:
    written = list(csv.DictReader(file))
  for row, expected in zip(written, rows.values(), strict=True):
    for name, value in row.items():
      assert value == ("" if expected.get(name) is None else str(expected[name]))
  lines = (config.output / "table.md").read_text(encoding="utf-8").splitlines()
  assert len(lines) == 2 + len(rows) and len({line.count("|") for line in lines}) == 1
  for name in ("pareto.png", "types.png", "strips.png"):
    with Image.open(config.output / name) as picture:
      assert min(picture.size) > 100
  assert "himap@2/4" in (config.output / "report.html").read_text(encoding="utf-8")


def test_other_settings_are_refused(config, rows):
  for changes, message in (
    ({"dtype": "bfloat16"}, "dtype was 'float32', now 'bfloat16'"),
    ({"num_questions": 5}, "questions"),
    ({"prompt_buckets": (50,)}, "prompt_buckets"),
  ):
    with pytest.raises(ValueError, match=f"other settings .*{message}.*another --workdir"):
      study.run(dataclasses.replace(config, **changes))


def test_the_command_goes_on_and_runs_nothing_again(config, rows):
  before = {path: path.stat().st_mtime_ns for path in config.workdir.rglob("*") if path.is_file()}
  names = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
  given = [
    f"--{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
    for name, value in names.items()
    if value is not None and value != ()
  ]
  done = subprocess.run(
    [sys.executable, "-m", "experiments.compare", *given],
    cwd=ROOT,
    capture_output=True,
    text=True,
    env=dict(os.environ),
  )
  assert done.returncode == 0, done.stderr
  assert "row" not in done.stderr and "fastervlm 5" in done.stdout
  assert {path: path.stat().st_mtime_ns for path in before} == before
  assert {path for path in config.workdir.rglob("*") if path.is_file()} == set(before)


def test_examples_take_types_in_turns():
  questions = [question(i, type="abc"[i % 3])._replace(image=pathlib.Path(f"{i // 3}.png")) for i in range(18)]
  assert [q.id for q in examples.choose(questions, 4)] == ["0", "4", "8", "9"]
  assert [q.id for q in examples.choose(questions, 99)] == ["0", "4", "8", "9", "13", "17"]


def test_strips_show_the_lowest_budget_that_most_reach():
  cells = make(names=["himap", "random"], budgets=[128, 64, 32])
  assert strips.cells_to_show(cells) == ["none", "himap 64", "random 64"]
  assert strips.cells_to_show([Cell("none", "none", schedule=cells[0].schedule)]) == ["none"]


def test_strips_fade_what_the_last_stage_drops(tmp_path):
  picture = Image.new("RGB", (60, 60), (200, 0, 0))
  example = Example(
    picture, (2, 2), "what?", "red", "t", {"a": Shown("red", [(0, [0, 1]), (1, [0])]), "b": Shown("no", [])}
  )
  strips.draw(tmp_path / "strips.png", [example], ["a", "b", "missing"])
  pixels = np.asarray(Image.open(tmp_path / "strips.png").convert("RGB")).reshape(-1, 3).astype(int)
  vivid, faded = ((np.abs(pixels - colour).max(1) <= 3).sum() for colour in ([200, 0, 0], [247, 217, 217]))
  assert vivid / faded == pytest.approx((1 + 4) / 3, rel=0.1)


def test_every_method_has_a_style_of_its_own():
  rows = [{"method": name, "budget": 64.0, "accuracy": 0.5} for name in METHODS_DRAWN]
  styles = plots.styles_of(rows)
  assert len({(style.colour, style.marker) for style in styles.values()}) == len(styles) == len(rows)
  places = collections.defaultdict(set)
  for style in styles.values():
    places[style.marker].add(style.place)
  assert all(len(found) == 1 for found in places.values())
