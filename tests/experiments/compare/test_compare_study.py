"""A comparison from its configuration to its tables, killed and resumed; tables, strips and plots of given answers."""

import collections
import contextlib
import csv
import functools
import itertools
import json
import pathlib
from types import SimpleNamespace

import commands
import numpy as np
import pytest
from absl import flags
from PIL import Image

import himap_jax
from experiments import question_sets
from experiments.compare import __main__ as command
from experiments.compare import measure, plots, report, tables
from experiments.compare.comparison import BY_SIZE, BY_TYPE, Comparison, controls
from experiments.compare.grid import Cell, Shape, make_cells
from experiments.compare.power import power
from experiments.compare.prompt_sizes import PromptSizes
from experiments.compare.report import Example, Shown
from experiments.question_sets import Question, is_right
from experiments.shared import study
from himap_jax.engine.accounting import model_sizes
from himap_jax.engine.engine import GenerationConfig
from himap_jax.errors import UserError
from himap_jax.generation import InputConfig
from himap_jax.pruning.config import build_schedule
from himap_jax.pruning.cost import costs
from himap_jax.pruning.methods import METHODS
from himap_jax.pruning.schedule import Schedule
from himap_jax.run.writer import OutputWriter

ROOT = pathlib.Path(__file__).parents[3]
NAME, N, NUM_LAYERS = "clip_mha", 16, 6
STUDIED, NUM_LAYERS_STUDIED = "dinov2_shrunk", 4  # as many image tokens, and fewer layers to compile
PRUNING = [name for name, method in METHODS.items() if name != "none" and not method.freezes]
METHODS_DRAWN = [
  *PRUNING,
  "shortv",
  *(f"{name}+{option}" for name in ("divprune", "scope", "fsr", "cdpruner") for option in ("restore", "positions")),
  "himap@1/4",
  "himap@2/4",
  *(f"{name}+himap" for name in ("divprune", "vispruner")),
]


def question(index, type="t", text="q", answer="a", guess=""):
  return Question(str(index), pathlib.Path(f"{index}.png"), text, answer, type, guess)


def write_rows(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_rows(path):
  return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@contextlib.contextmanager
def flags_of(*arguments):
  """The command's flags, parsed in this process without a trace."""
  own = flags.FlagValues()
  with pytest.MonkeyPatch.context() as patch:
    for name in ("DEFINE_string", "DEFINE_enum", "DEFINE_integer", "DEFINE_list", "DEFINE_bool", "DEFINE_float"):
      patch.setattr(flags, name, functools.partial(getattr(flags, name), flag_values=own))
    patch.setattr(flags, "FLAGS", own)
    study.define_shared_flags(**command.DEFAULTS)
    command.define_flags()
    own(["compare", *arguments])
    yield own


def arguments_of(config, **changes):
  return [f"--{name}={value}" for name, value in (vars(config) | changes).items()]


def run(config, **changes):
  """Runs the command in this process; returns the rows of its table."""
  with flags_of(*arguments_of(config, **changes)) as values:
    comparison, *others = command.compare(values)
    command.write(comparison, *others, values)
    return comparison.rows(seed=values.seed)


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
  generation, inputs = GenerationConfig(3), InputConfig("<image>{question}", (40,), batch_size=2)
  pictures = [images[int(row["image"][0])] for row in rows[1::2]]
  questions = [row["question"] for row in rows[1::2]]
  answers = himap_jax.generate(loaded(STUDIED), pictures, questions, generation=generation, inputs=inputs)
  rows[1::2] = [row | {"answer": answer.text} for row, answer in zip(rows[1::2], answers, strict=True)]
  write_rows(folder / "questions.jsonl", rows)
  return SimpleNamespace(
    checkpoint=loaded(STUDIED).directory,
    question_set=folder / "questions.jsonl",
    workdir=folder / "work",
    output=folder / "output",
    methods="himap@2/3,fastervlm",
    budgets="10,8",
    pairs="fastervlm 8~none in why",
    num_questions=9,
    max_new_tokens=3,
    prompt_template=inputs.prompt_template,
    prompt_buckets=40,
    batch_size=2,
    timing_new_tokens=2,
    timing_repeats=1,
    num_examples=3,
    num_strips=2,
    compilation_cache_dir="",
  )


@pytest.fixture(scope="module")
def rows(config):
  """A study that was killed in its second cell, with a torn row, and ran to its end at the second start."""
  write, count = OutputWriter.write, itertools.count()
  with pytest.MonkeyPatch.context() as patch:

    def dying(self, rows):
      if next(count) == 7:
        raise Killed
      write(self, rows)

    patch.setattr(OutputWriter, "write", dying)
    with pytest.raises(Killed):
      run(config)
  answers = sorted((config.workdir / "answers").glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
  assert [len(read_rows(path)) for path in answers] == [9, 5]
  with open(answers[1], "a", encoding="utf-8") as file:
    file.write('{"id": "0wh')
  return {row["label"]: row for row in run(config)}


def questions_of(config):
  return question_sets.load(config.question_set, num_questions=9, seed=0, workdir=config.workdir)


def test_questions_without_an_answer_are_told(config, rows, capsys):
  (path,) = (config.workdir / "answers").glob("none.*.jsonl")
  answers = {row["id"]: row for row in read_rows(path)}
  measure.report_errors(answers)
  message = "1 question has no answer, bad: 9.png: No such file"
  assert message in capsys.readouterr().err.replace(f"{config.question_set.parent}/", "")
  with pytest.raises(UserError, match="^1 question has no answer, bad: .*9.png"):
    measure.report_errors({"bad": answers["bad"]})
  with pytest.raises(UserError, match="^2 questions have no answer; the first, bad: .*9.png"):
    measure.report_errors({"bad": answers["bad"], "same": answers["bad"]})
  measure.report_errors({"0why": answers["0why"]})
  assert capsys.readouterr().err == ""


def test_every_question_is_answered_once(config, rows):
  ids = [q.id for q in questions_of(config)]
  files = list((config.workdir / "answers").glob("*.jsonl"))
  assert len(files) == 4
  for path in files:
    assert sorted(row["id"] for row in read_rows(path)) == sorted(ids)


def test_rows_equal_what_the_answers_say(config, rows):
  assert list(rows) == ["none", "question only", "himap@2/3 10", "himap@2/3 8", "fastervlm 10", "fastervlm 8"]
  questions = questions_of(config)
  given = {
    label: {row["id"]: row for row in read_rows(path)}
    for label in rows
    for path in (config.workdir / "answers").glob(f"{label.replace('/', '-').replace(' ', '-')}.*.jsonl")
  }
  assert set(given) == {"none", "himap@2/3 10", "fastervlm 10", "fastervlm 8"}
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
    kept = [N] * NUM_LAYERS_STUDIED
    for layer, count in (
      zip(map(int, (row["prune_layers"] or "").split("/")), row["keep"].split("/"), strict=True) if row["keep"] else ()
    ):
      kept[layer:] = [int(count)] * (NUM_LAYERS_STUDIED - layer)
    assert row["tokens_in"] == pytest.approx(np.mean(kept))
    assert row["tokens_out"] == pytest.approx(np.mean([*kept[1:], kept[-1]]))
    d, m = 48, 96
    eq10 = [
      sum(4 * n * d * d + 2 * n * n * d + 2 * n * d * m for n in counts) for counts in (kept, [N] * NUM_LAYERS_STUDIED)
    ]
    assert row["image_token_flops"] == pytest.approx(eq10[0] / eq10[1])
    lengths = own[questions[1].id]["counts"]["kept"]
    assert lengths == [int(count) for count in (row["keep"] or "").split("/") if count]
    (timing,) = (config.workdir / "timings").glob(f"{label.replace('/', '-').replace(' ', '-')}.*.json")
    measured = json.loads(timing.read_text())
    assert row["prefill_time"] == measured["prefill_ratio"] > 0 and row["decode_time"] == measured["decode_ratio"] > 0
  assert rows["none"]["accuracy"] >= 4 / 9 and rows["none"]["agreement"] == 8 / 9 and rows["none"]["difference"] == 0
  for label in given:
    assert rows[label]["difference"] == pytest.approx(rows[label]["accuracy"] - rows["none"]["accuracy"])
  guessed = [is_right(q.guess, q.answer) for q in questions]
  assert rows["question only"]["accuracy"] == pytest.approx(np.mean(guessed))


def test_methods_are_held_against_random_at_their_budget(loaded):
  shape = dict(num_layers=NUM_LAYERS, num_image_tokens=N)
  names = (("random", 8), ("himap", 8), ("fastv", 8), ("himap", 2), ("random", 2), ("fastv", 2))
  cells = [Cell("none", "none", schedule=Schedule())]
  for name, budget in names:
    schedule = build_schedule(name, **shape, prune_layers=(2, 4) if name == "himap" else (2,), keep=None)
    cells.append(Cell(name, f"{name} {budget}", float(budget), None if (name, budget) == ("fastv", 2) else schedule))
  questions = [question(i, type="ab"[i % 2])._replace(answer="yes", guess="no") for i in range(4)]
  right = {"none": 4, "random 8": 2, "himap 8": 3, "fastv 8": 1, "himap 2": 2, "random 2": 0}
  answers = {
    label: {q.id: {"answer": "yes" if i < count else "no"} for i, q in enumerate(questions)}
    for label, count in right.items()
  }
  sizes = PromptSizes(model_sizes(loaded(NAME).config, (28, 28)), N, num_text_tokens=10)
  rows = Comparison(questions, cells, answers, {key: {} for key in answers}, sizes).rows(seed=0)
  by_label = {row["label"]: row for row in rows}
  beyond = {label: row["beyond_random"] for label, row in by_label.items() if "beyond_random" in row}
  assert beyond == {"random 8": 0.0, "himap 8": 0.25, "fastv 8": -0.25, "himap 2": 0.5, "random 2": 0.0}
  assert (by_label["himap 8"]["beyond_random_low"], by_label["himap 8"]["beyond_random_high"]) == (0.0, 0.75)
  assert "| +25.0% | +0.0% to +75.0% |" in tables.markdown(rows, tables.readable_columns(rows))
  assert tables.by_group(rows, BY_TYPE).splitlines() == [
    "| budget |  | a | b |",
    "| --- | --- | --- | --- |",
    "|  | none | 100.0% | 100.0% |",
    "|  | question only | 0.0% | 0.0% |",
    "| 8 | random | 50.0% | 50.0% |",
    "| 8 | mean of 1 methods | 100.0% | 50.0% |",
    "| 8 | himap | 100.0% | 50.0% |",
    "| 8 | fastv | 50.0% | 0.0% |",
    "| 2 | random | 0.0% | 0.0% |",
    "| 2 | mean of 1 methods | 50.0% | 50.0% |",
    "| 2 | himap | 50.0% | 50.0% |",
  ]


def test_statements_hold_together_and_chance_is_averaged(loaded, tmp_path):
  """What is above random tokens, below them or neither; random tokens count with the mean of their seeds."""
  shape = dict(num_layers=NUM_LAYERS, num_image_tokens=N)
  cells = [Cell("none", "none", schedule=Schedule())]
  for name in ("random", "himap", "fastv", "uniform"):
    layers = {"himap": (2, 4), "fastv": (2,)}.get(name, (0,))
    schedule = build_schedule(name, **shape, prune_layers=layers, keep=None)
    cells.append(Cell(name, f"{name} 8", 8.0, schedule))
  cells.append(Cell("random", "random:50%", None, cells[1].schedule))  # a setting is no control
  assert [cell.uses_chance for cell in cells] == [False, True, False, False, False, True]
  sizes_of = [1.0, 2.0, 30.0, None]
  questions = [question(i)._replace(answer="yes", guess="no", size=sizes_of[i % 4]) for i in range(40)]

  def given(count):
    return {q.id: {"answer": "yes" if i < count else "no"} for i, q in enumerate(questions)}

  right = {"none": 40, "random 8": 20, "himap 8": 40, "fastv 8": 2, "uniform 8": 18, "random:50%": 30}
  answers = {label: given(count) for label, count in right.items()}
  sizes = PromptSizes(model_sizes(loaded(NAME).config, (28, 28)), N, num_text_tokens=10)
  repeats = {"random 8": [given(10), given(15)]}
  timings = {key: {"prefill_ratio": 0.5} for key in answers}
  rows = Comparison(questions, cells, answers, timings, sizes, repeats).rows(seed=0)
  by_label = {row["label"]: row for row in rows}
  assert by_label["random 8"]["accuracy"] == pytest.approx(15 / 40)
  assert by_label["himap 8"]["beyond_random"] == pytest.approx(25 / 40)
  assert by_label["himap 8"]["beyond_random_p"] < 0.001 < 0.05 < by_label["uniform 8"]["beyond_random_p"]
  above, below, neither = tables.findings(rows).splitlines()[-1].split(" | ")[1:]
  assert (above, below, neither) == ("himap +62.5", "fastv -32.5", "uniform +7.5 |")
  assert by_label["fastv 8"][f"{BY_SIZE}1"] == pytest.approx(1 / 10) and by_label["fastv 8"][f"{BY_SIZE}above 6"] == 0.0
  assert tables.groups_of(rows, BY_SIZE) == ["1", "2", "above 6"]
  assert "beyond_random" not in by_label["random:50%"]
  plots.plot_costs(tmp_path / "flops.png", rows, plots.FLOPS)
  plots.plot_costs(tmp_path / "time.png", rows, plots.TIME)
  plots.plot_sizes(tmp_path / "sizes.png", rows)
  for name in ("flops", "time", "sizes"):
    with Image.open(tmp_path / f"{name}.png") as picture:
      assert np.asarray(picture.convert("L")).std() > 5


def test_the_control_keeps_positions_as_the_cell_does():
  shape = Shape(NUM_LAYERS, N)
  before = ["random", "random+positions", "random+restore", "divprune", "divprune+positions", "divprune+restore"]
  cells = make_cells(shape, [*before, "himap@2/4"], [8.0], ["random:50%"], None)
  plain, positions, restore = ("random 8", "random+positions 8", "random+restore 8")
  expected = dict(zip(before, [plain, positions, restore] * 2, strict=True)) | {"himap@2/4": positions}
  assert controls(cells) == {f"{name} 8": control for name, control in expected.items()}
  without = [cell for cell in cells if cell.method not in ("random+positions", "random+restore")]
  assert controls(without) == {cell.label: plain for cell in without if cell.budget is not None}
  assert controls([cell for cell in without if cell.method != "random"]) == {}


def test_a_comparison_that_cannot_tell_stops_before_any_work():
  cells = [Cell("fastv", "fastv 8", 8.0, Schedule())]
  with pytest.raises(ValueError, match=r"8\.9 points .* the requested limit is 3 points: take more questions"):
    power(200, cells, disagreement=0.2, least_difference=3.0)
  assert "3.0 points" in power(1750, cells, disagreement=0.2, least_difference=3.0)


def test_figures_of_a_cell(loaded):
  shape = dict(num_layers=NUM_LAYERS, num_image_tokens=N)
  cells = [
    Cell("none", "none", schedule=Schedule()),
    Cell("himap@2/4", "himap", schedule=build_schedule("himap", **shape, prune_layers=(2, 4), keep=(8, 3))),
    Cell("shortv", "shortv", schedule=build_schedule("shortv", **shape, prune_layers=(1, 3, 5))),
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
  sizes = PromptSizes(model_sizes(loaded(NAME).config, (28, 28)), N, num_text_tokens=10, bytes_per_value=2)
  rows = Comparison(questions, cells, answers, {"none": {}, "himap": timing, "shortv": {}}, sizes).rows(seed=0)
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
  assert himap["scoring_share"] == pytest.approx(scoring / costs(sizes.model, cells[1].schedule, N, 10).prefill)
  assert himap["cache"] == pytest.approx(sum(n + 10 for n in present) / (NUM_LAYERS * (N + 10)))
  assert himap["cache_bytes"] == sum(n + 10 for n in present) * 2 * d * 2
  assert (himap["tokens_in"], himap["tokens_updated"]) == (np.mean(present), np.mean(present))
  assert (shortv["tokens_in"], shortv["tokens_updated"], shortv["cache"]) == (N, N / 2, 1.0)
  assert (himap["prefill_time"], himap["decode_time"], himap["compile_seconds"]) == (0.5, 0.25, 5.0)
  assert by_label["none"]["prefill_time"] is None
  assert [column.label for column in tables.readable_columns(rows)].count("errors") == 1


def test_costs_are_means_where_rows_keep_different_counts(loaded):
  schedule = build_schedule(
    "himap_adaptive", num_layers=NUM_LAYERS, num_image_tokens=N, prune_layers=(2, 4), keep=(12, 6)
  )
  cells = [Cell("none", "none", schedule=Schedule()), Cell("himap_adaptive", "adaptive", schedule=schedule)]
  questions = [question(i) for i in range(4)]
  counts = [(4, 1), (12, 6), (12, 6), None]  # the last one could not be answered
  rows = [{"answer": None} if own is None else {"answer": "a", "counts": {"kept": own}} for own in counts]
  answers = {"none": {q.id: {"answer": "a", "counts": {"kept": []}} for q in questions}}
  answers["adaptive"] = {q.id: row for q, row in zip(questions, rows, strict=True)}
  sizes = PromptSizes(model_sizes(loaded(NAME).config, (28, 28)), N, num_text_tokens=10)
  *_, row = Comparison(questions, cells, answers, {"none": {}, "adaptive": {}}, sizes).rows(seed=0)
  few, many = (costs(sizes.model, schedule.with_counts(own), N, 10) for own in counts[:2])
  assert row["tokens_in"] == pytest.approx((np.mean([N, N, 4, 4, 1, 1]) + 2 * np.mean([N, N, 12, 12, 6, 6])) / 3)
  assert row["cache_bytes"] == round((few.cache_bytes + 2 * many.cache_bytes) / 3)


class Clock:
  """Stands for a generator whose n-th run takes `seconds[n]` in prefill and twice that in decoding."""

  programs = SimpleNamespace(seconds=7.0)

  def __init__(self, *seconds):
    self.seconds = iter(seconds)

  def __call__(self, inputs, ids):
    seconds = next(self.seconds)
    return SimpleNamespace(prefill_seconds=seconds, decode_seconds=2 * seconds)


def test_times_are_medians_of_ratios_without_the_first_run():
  inputs = SimpleNamespace(tokens=np.zeros((1, 3)))
  measured = measure.measure_times(Clock(99.0, 2.0, 4.0, 10.0), Clock(50.0, 1.0, 3.0, 1.0), inputs, repeats=3)
  assert measured["prefill_ratio"] == measured["decode_ratio"] == 0.5
  assert (measured["prefill_seconds"], measured["decode_seconds"], measured["compile_seconds"]) == (1.0, 2.0, 7.0)


def test_a_budget_that_cannot_be_reached_is_a_row(config, rows):
  row = rows["himap@2/3 8"]
  assert row["note"] == "the lowest mean reachable is 8.5 tokens" and "accuracy" not in row
  markdown = (config.output / "table.md").read_text(encoding="utf-8")
  assert "| himap@2/3 | 8 | the lowest mean reachable is 8.5 tokens |" in markdown


def test_outputs(config, rows):
  assert "| fastervlm 8 | none | 4 (why) |" in (config.output / "pairs.md").read_text()
  with open(config.output / "table.csv", encoding="utf-8") as file:
    written = list(csv.DictReader(file))
  for row, expected in zip(written, rows.values(), strict=True):
    for name, value in row.items():
      assert value == ("" if expected.get(name) is None else str(expected[name]))
  lines = (config.output / "table.md").read_text(encoding="utf-8").splitlines()
  assert len(lines) == 2 + len(rows) and len({line.count("|") for line in lines}) == 1
  for name in ("flops.png", "types.png", "strips.png"):
    with Image.open(config.output / name) as picture:
      assert min(picture.size) > 100
  assert "himap@2/3" in (config.output / "report.html").read_text(encoding="utf-8")


def test_other_settings_are_refused(config, rows):
  for changes, message in (
    ({"dtype": "bfloat16"}, "dtype was 'float32', now 'bfloat16'"),
    ({"num_questions": 5}, "questions"),
    ({"prompt_buckets": 50}, "prompt_buckets"),
  ):
    with pytest.raises(ValueError, match=f"other settings .*{message}.*another --workdir"):
      run(config, **changes)


def test_the_command_goes_on_and_runs_nothing_again(config, rows):
  before = {path: path.stat().st_mtime_ns for path in config.workdir.rglob("*") if path.is_file()}
  done = commands.Command("experiments.compare", *arguments_of(config))
  table, errors = done.communicate()
  assert "fastervlm 8" in table and "row" not in errors
  assert "1 question has no answer, bad: " in errors and done.process.exitcode == 1
  assert {path: path.stat().st_mtime_ns for path in before} == before
  assert {path for path in config.workdir.rglob("*") if path.is_file()} == set(before)


def test_flags():
  needed = ("--workdir=work", "--output=output")
  with flags_of(*needed) as values:
    defaults = values.question_set, values.num_questions, values.batch_size, values.prompt_buckets
    assert defaults == ("easyvqa", None, 8, ["64", "128", "256", "512", "1024", "2048"])
  with flags_of(f"--flagfile={ROOT / 'experiments/flags/compare_scenes.flags'}") as values:
    assert (values.question_set, values.num_questions, values.prompt_buckets) == ("scenes", 1438, ["64"])


def test_examples_take_types_in_turns():
  questions = [question(i, type="abc"[i % 3])._replace(image=pathlib.Path(f"{i // 3}.png")) for i in range(18)]
  assert [q.id for q in report.choose(questions, 4)] == ["0", "4", "8", "9"]
  assert [q.id for q in report.choose(questions, 99)] == ["0", "4", "8", "9", "13", "17"]


def test_strips_show_the_lowest_budget_that_most_reach():
  cells = make_cells(Shape(30, 576), ("himap", "random"), (128, 64, 32), (), None)
  assert report.cells_to_show(cells) == ["none", "himap 64", "random 64"]
  assert report.cells_to_show([Cell("none", "none", schedule=cells[0].schedule)]) == ["none"]


def test_strips_fade_what_the_last_stage_drops(tmp_path):
  picture = Image.new("RGB", (60, 60), (200, 0, 0))
  cells = {"a": Shown("red", [(0, [0, 1]), (1, [0])]), "b": Shown("no", [])}
  example = Example(picture, (2, 2), question(0, text="what?", answer="red"), cells)
  plots.draw_strips(tmp_path / "strips.png", [example], ["a", "b", "missing"])
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
