"""The command on data sets in their published layout: scores, preview, resuming, scoring apart, submissions."""

import csv
import functools
import hashlib
import json
import shutil
from types import SimpleNamespace

import commands
import numpy as np
import published
import pytest

from experiments.compare.grid import Shape, parse_setting
from experiments.evaluate import loading, paper, report, scores
from experiments.evaluate.answers import contract_of, prompts_of
from experiments.evaluate.evaluator import EvaluationConfig, Evaluator
from experiments.evaluate.harness import HarnessRun
from experiments.evaluate.metrics import captions
from experiments.evaluate.scores import Results
from experiments.evaluate.tasks import TASKS
from experiments.evaluate.tasks.task import Sample
from experiments.shared import geometries, tabular
from himap_jax import UserError, checkpoint
from himap_jax.engine.accounting import model_sizes
from himap_jax.harness.settings import Settings
from himap_jax.pruning.schedule import Schedule
from himap_jax.run.output import Output

SETTINGS = ("none", "himap@1/3:8/4")


@pytest.fixture(scope="module")
def evaluate(checkpoints, tmp_path_factory):
  """Returns `evaluate(task, *arguments)`: the exit status, what is printed, and the folder of all results."""
  work = tmp_path_factory.mktemp("evaluate")

  def evaluate(task, *arguments, flagfile="", tasks=()):
    data = published.write_hub(task, work / "data") if not tasks else work
    command = commands.Command(
      "experiments.evaluate", f"--flagfile={flagfile}", f"--tasks={','.join(tasks or [task])}",
      f"--settings={','.join(SETTINGS)}", f"--data={data}",
      f"--checkpoint={checkpoints('dinov2_shrunk').directory}", "--prompt_template=<image>{question}", "--dtype=float32",
      f"--workdir={work / 'work'}", f"--output={work / 'out'}", f"--compilation_cache_dir={work / 'compiled'}",
      "--batch_size=2", *arguments,
    )  # fmt: skip
    printed, errors = command.communicate()
    return command.process.exitcode, printed + errors, work

  return evaluate


def samples_of(folder, task, setting):
  return [json.loads(line) for line in (folder / "out" / f"{task}-{setting}.jsonl").read_text().splitlines()]


@pytest.mark.sampled(of="commands of studies")
def test_a_task_is_scored(evaluate):
  status, printed, work = evaluate("pope")
  assert status == 0, printed
  with open(work / "out/evaluate.csv", newline="") as file:
    rows = list(csv.DictReader(file))
  assert [row["setting"] for row in rows] == list(SETTINGS)
  assert float(rows[0]["flops"]) == 1 and 0 < float(rows[1]["flops"]) < 1
  assert float(rows[0]["agreement"]) == 1 and float(rows[0]["difference"]) == 0
  own = samples_of(work, "pope", "none")
  assert int(rows[0]["questions"]) == len(own) and "POPE, none: the first" in printed
  for sample in own:  # a random model says neither yes nor no, which counts as yes
    assert sample["score"] == float(sample["references"] == ["yes"]) and repr(sample["question"]) in printed
  rows_before = (work / "work/pope/none.jsonl").read_text()
  status, again, _ = evaluate("pope", "--score_only")
  assert status == 0 and (work / "work/pope/none.jsonl").read_text() == rows_before
  again, printed = ([line for line in text.splitlines() if line.startswith("| pope |")] for text in (again, printed))
  assert again == printed and len(again) == len(SETTINGS)
  answers = next(path for path in (work / "work/pope").glob("himap*.jsonl"))
  answers.write_text("".join(answers.read_text().splitlines(keepends=True)[1:]))
  status, printed, _ = evaluate("pope", "--score_only")
  assert status == 2 and f"lacks 1 of {len(own)} answers to pope with {SETTINGS[1]}" in printed


def test_data_of_all_tasks_are_looked_for_first(evaluate):
  """Before anything is answered; nothing is left behind."""
  status, printed, work = evaluate("textvqa", "--tasks=textvqa,docvqa")
  assert status == 2 and "docvqa" in printed.splitlines()[-1].lower() and not list((work / "work").glob("textvqa*"))


def test_scores_need_answers(evaluate):
  status, printed, _ = evaluate("gqa", "--score_only")
  assert status == 2 and "has no answers to gqa with none" in printed


@pytest.mark.parametrize("name", paper.TABLES)
def test_flagfiles_of_the_paper(evaluate, name):
  """Every flag and setting of the flagfile is accepted, and everything of the table is in it."""
  given = paper.flags_of(name)
  tasks, settings = given["tasks"].split(","), given["settings"].split(",")
  assert given["paper_table"] == name and settings[0] == "none"
  assert {task for task, _ in paper.TABLES[name].reported} <= set(tasks) <= set(TASKS)
  assert {setting for _, setting in paper.TABLES[name].reported} <= set(settings)
  flagfile = paper.FLAG_FILES / f"paper_table_{name}.flags"
  for label in settings:
    assert bool(parse_setting(label).schedule(*Shape(32, 576)).stages) == (label != "none")
  status, printed, _ = evaluate(tasks[0], "--score_only", flagfile=flagfile, tasks=tasks)
  assert status == 2 and f"has no answers to {tasks[0]} with none" in printed


def test_tables_of_the_paper(tmp_path):
  """Numbers of the paper stand beside ours; what was not run says so."""
  assert sorted(path.stem for path in paper.FLAG_FILES.glob("paper_table_*")) == sorted(
    f"paper_table_{name}" for name in paper.TABLES
  )
  (tmp_path / "paper_table_1_output").mkdir()
  rows = [
    {"task": "mme", "setting": "none", "questions": 2374, "score": 1862.04, "score_low": 1830.0, "score_high": 1890}
  ]
  rows.append({"task": "vqav2_testdev", "setting": "none", "questions": 7})
  tabular.write_csv(tmp_path / "paper_table_1_output/evaluate.csv", rows)
  lines = paper.page(tmp_path)
  assert "| mme | `none` | 1749.9 | 1862.0 (1830.0 to 1890.0) | 2374 |" in lines
  assert "| mme | `himap@2/8:50%/12.5%` | 1785.1 | not run | – |" in lines
  assert "| vqav2_testdev | `none` | 78.3 | answers for the server | 7 |" in lines
  (row,) = paper.with_paper(rows[:1], "1")
  assert row["paper"] == 1749.9 and "1749.9" in "\n".join(report.summary([row], []))


@pytest.mark.parametrize("count", [1, 400])
def test_intervals_of_means(count):
  """As narrow as the binomial's, and of one question that point alone."""
  task = TASKS["gqa"]
  samples = [Sample(str(n), question="?", references=("yes",)) for n in range(count)]
  answers = {"none": {str(n): {"answer": "yes" if n % 4 else "no"} for n in range(count)}}
  sizes = model_sizes(geometries.model_of("demo"), (336, 336))
  (row,) = Results(task, samples, answers, {"none": Schedule()}, sizes).rows()
  half = 196 * (0.75 * 0.25 / count) ** 0.5 if count > 1 else 0
  assert row["score_high"] - row["score"] == pytest.approx(half, abs=0.8)
  assert row["score"] - row["score_low"] == pytest.approx(half, abs=0.8)


@pytest.mark.parametrize("name", ["gqa", "chartqa", "docvqa"])
def test_questions_about_one_picture_are_drawn_together(name):
  """Ten pictures of ten questions that are all right or all wrong: as uncertain as ten questions."""
  task = TASKS[name]
  samples = [Sample(str(n), references=("yes",), picture=str(n // 10)) for n in range(100)]
  rows = {str(n): {"answer": "yes" if n // 10 % 2 else "no", "error": None} for n in range(100)}
  rows["99"] = {"answer": None, "error": "damaged"}
  sizes = model_sizes(geometries.model_of("demo"), (336, 336))
  answers = {"none": rows, "other": rows}
  results = Results(task, samples, answers, dict.fromkeys(answers, Schedule()), sizes)
  first, second = results.rows()
  half = 1.96 * 100 * (0.25 / 10) ** 0.5
  assert (first["score_high"] - first["score_low"]) / 2 == pytest.approx(half, rel=0.15)
  assert first["errors"] == 1 and second["agreement"] == pytest.approx(0.99)
  assert "| errors |" in "".join(report.summary([first, second], [task]))


def test_scores_without_java_are_explained():
  row = {"task": "nocaps", "setting": "none", "questions": 2}
  lines = ["\n".join(report.summary([row | {f"nocaps: {name}": 50.0}], [])) for name in ("CIDEr", "~CIDEr")]
  assert ["No Java was found" in line for line in lines] == [False, True]


@pytest.mark.parametrize("mark", ["", "~"])
def test_intervals_of_captions_score_the_set_once(mark, monkeypatch):
  """As those of a mean over the captions' own scores."""
  each, scored = np.random.default_rng(0).random(50), []

  def score(given, references):
    scored.append(given)
    return captions.CaptionScores({f"{mark}CIDEr": 100 * each.mean()}, each.tolist())

  monkeypatch.setattr(captions, "score", score)
  samples = [Sample(str(n), references=("a cat",)) for n in range(50)]
  answers = {sample.id: {"answer": sample.id} for sample in samples}
  sizes = model_sizes(geometries.model_of("demo"), (336, 336))
  (row,) = Results(TASKS["nocaps"], samples, {"none": answers}, {"none": Schedule()}, sizes).rows()
  half = 196 * (each.var() / 50) ** 0.5
  assert (row["score_low"], row["score_high"]) == pytest.approx(
    (row["score"] - half, row["score"] + half), abs=half / 5
  )
  assert len(scored) <= 4 and set(scored) == {tuple(answers)}


def test_intervals_are_paired():
  """The difference between two settings that answer alike is exactly zero, whatever is drawn."""
  task = TASKS["gqa"]
  samples = [Sample(str(n), question="?", references=("yes",)) for n in range(20)]
  answers = {str(n): {"answer": "yes" if n % 3 else "no"} for n in range(20)}
  sizes = model_sizes(geometries.model_of("demo"), (336, 336))
  settings = dict.fromkeys((scores.REFERENCE, "other"))
  results = Results(task, samples, dict.fromkeys(settings, answers), dict.fromkeys(settings, Schedule()), sizes)
  first, second = results.rows()
  assert first["score"] == pytest.approx(65) and first["score_low"] < 65 < first["score_high"]
  assert second["difference"] == second["difference_low"] == second["difference_high"] == 0
  assert Results(task, samples, {"none": {}}, {"none": Schedule()}, sizes).rows()[0]["score"] == 0


@pytest.mark.parametrize(
  ("name", "value"), [("mme", lambda right: 50 * sum(right) + 100 * all(right)), ("mmbench_en", all)]
)
def test_intervals_of_groups(name, value):
  """As a plain bootstrap of the groups' own values has them: a group that is drawn twice counts twice."""
  rng, task = np.random.default_rng(1), TASKS[name]
  right = rng.random((60, 2)) < 0.8
  options = {"yes": "yes", "no": "no"} if name == "mme" else {"A": "yes", "B": "no"}
  good, bad = options
  samples = [
    Sample(f"{n}{k}", references=(good,), options=options, category="count", group=str(n))
    for n in range(60)
    for k in range(2)
  ]
  answers = {sample.id: {"answer": good if own else bad} for sample, own in zip(samples, right.flat, strict=True)}
  runs = {"none": answers, "other": {sample.id: {"answer": good} for sample in samples}}
  sizes = model_sizes(geometries.model_of("demo"), (336, 336))
  first, second = Results(task, samples, runs, dict.fromkeys(runs, Schedule()), sizes).rows()
  values = np.array([float(value(own)) for own in right]) * (100 if name == "mmbench_en" else 1)
  low, high = np.quantile(values[rng.integers(60, size=(10_000, 60))].mean(axis=1), (0.025, 0.975))
  assert first["score"] == pytest.approx(values.mean())
  near = functools.partial(pytest.approx, abs=0.07 * (high - low))
  assert (first["score_low"], first["score_high"]) == near((low, high))
  best = 200 if name == "mme" else 100
  assert (second["difference_low"], second["difference_high"]) == near((best - high, best - low))


def test_costs_are_of_the_questions_of_the_limit():
  counts = {"tiles": 1, "image_tokens": 576, "text_tokens": 50, "kept": []}
  rows = {
    str(n): {"answer": "yes", "counts": counts, "timing": {"prefill_seconds": 10.0**n, "decode_seconds": 0.0}}
    for n in range(3)
  }
  sizes = model_sizes(geometries.model_of("demo"), (336, 336))
  samples = [Sample(str(n), references=("yes",)) for n in (0, 9)]  # the second has no row
  (row,) = Results(TASKS["gqa"], samples, {"none": rows}, {"none": Schedule()}, sizes).rows()
  assert row["seconds"] == 1 and row["flops"] == 1


def test_a_checkpoint_that_changes_while_it_is_loaded(checkpoints, tmp_path, monkeypatch):
  directory = shutil.copytree(checkpoints("dinov2_shrunk").directory, tmp_path / "checkpoint")
  opened = checkpoint.open_checkpoint(str(directory), cache_dir=tmp_path / "cache")

  def restore(self, **_):
    with open(directory / "chat_template.jinja", "a") as file:
      file.write(" ")

  monkeypatch.setattr(checkpoint.OpenCheckpoint, "restore", restore)
  sizes = model_sizes(geometries.model_of("demo"), (336, 336))
  evaluator = Evaluator(opened, EvaluationConfig(Settings(), tmp_path, tmp_path), {}, sizes)
  with pytest.raises(UserError, match=f"{directory}: the checkpoint has changed since the run began"):
    _ = evaluator._loaded


def test_answers_of_others_are_not_scored(tmp_path):
  """Those of another checkpoint, setting or schedule, and to another question."""
  task, directories = TASKS["gqa"], (tmp_path / "work", tmp_path / "out")
  for directory in directories:
    directory.mkdir()
  sizes = model_sizes(geometries.model_of("demo"), (336, 336))

  def evaluator(digest="a", schedule=Schedule(), **settings):
    config = EvaluationConfig(Settings(**settings), *directories, str(tmp_path / "data"), score_only=True)
    return Evaluator(SimpleNamespace(digest=lambda: digest), config, {"none": schedule}, sizes)

  data = published.write_hub("gqa", tmp_path / "data")
  prompts = prompts_of(lambda: loading.load(task, str(data)))
  contract = contract_of(directories[0], evaluator()._subject, task, "none", Schedule(), prompts)
  contract.output.parent.mkdir()
  with Output(contract, resume=True) as output:
    output.write([{"id": key, "answer": "no", "error": None, "digest": contract.digest} for key in prompts.keys])
  with pytest.raises(UserError, match="checkpoint was 'a', now 'b'; dtype was 'bfloat16', now 'float32'"):
    evaluator("b", dtype="float32").rows(task)
  with pytest.raises(UserError, match="made with other settings .prune_layers was \\[\\], now \\[2\\]"):
    evaluator(schedule=Schedule(frozen_layers=(2,))).rows(task)
  with pytest.raises(UserError, match="1 questions or pictures have changed; use another --workdir"):
    evaluator().rows(task)
  (prompt,) = prompts.where(np.ones(1, bool))
  digest = contract.row_digest(prompt, [hashlib.sha256(image).hexdigest() for image in prompt.images])
  contract.output.write_text(json.dumps({"id": prompt.id, "answer": "no", "error": None, "digest": digest}))
  assert evaluator().rows(task)[0]["questions"] == 1
  contract.output.write_text(contract.output.read_text()[:-20])
  with pytest.raises(UserError, match="--score_only: .* has no answers to gqa with none"):
    evaluator().rows(task)


def test_responses_of_another_schedule_are_not_used(tmp_path):
  """For a task of lmms-eval."""
  subjects = []

  def run(recorded, limit):
    subjects.append(recorded._subject)
    return HarnessRun({}, {}, [])

  config = EvaluationConfig(Settings(), tmp_path, tmp_path, score_only=True)
  sizes = model_sizes(geometries.model_of("demo"), (336, 336))
  for schedule in (Schedule(), Schedule(frozen_layers=(2,)), Schedule(parameters=(("threshold", 0.5),))):
    evaluator = Evaluator(SimpleNamespace(digest=lambda: "a"), config, {"own": schedule}, sizes)
    evaluator.harness_rows(SimpleNamespace(name="task", run=run))
  assert len(set(subjects)) == 3
