"""The comparison of dtypes, on rows written by hand and on a tiny checkpoint."""

import json
import pathlib

import commands
import pytest

from experiments.dtypes import compare
from experiments.dtypes.__main__ import measure
from experiments.question_sets import Question
from himap_jax import GenerationConfig, InputConfig
from himap_jax.errors import UserError
from himap_jax.run.config import RunConfig

ROWS = [
  {"id": "1", "answer": "a", "kept": [[0, 1, 2, 3], [0, 1]], "error": None},
  {"id": "2", "answer": "b", "kept": [[4, 5, 6, 7], [4, 5]], "error": None},
  {"id": "3", "answer": None, "error": "damaged"},
]
QUESTIONS = [
  Question(str(number), pathlib.Path(f"{number}.png"), "Why?", answer, "", "")
  for number, answer in enumerate(("A", "b", "c"), start=1)
]


def write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def read(directory, rows):
  return compare.read(write(directory / "rows.jsonl", rows))


def test_agreement_of_rows(tmp_path):
  changed = [ROWS[0], ROWS[1] | {"answer": "c", "kept": [[4, 5, 6, 0], [0, 1]]}, ROWS[2]]
  table = compare.rows("himap", {"float32": read(tmp_path, ROWS), "int8": read(tmp_path, changed)}, QUESTIONS)
  reference, own = table
  assert reference == {"method": "himap", "weights": "float32", "questions": 2, "right": 1.0}
  exact = {"same_answer": 0.5, "same_kept": 0.5, "overlap": (1 + 1 + 0.75 + 0) / 4, "right": 0.5, "difference": -0.5}
  assert {name: own[name] for name in exact} == exact
  assert (own["same_answer_low"], own["same_answer_high"], own["difference_low"]) == (0.0, 1.0, -1.0)  # two pictures
  assert compare.summary(table)[-2:] == [
    "| himap | float32 | – | – | – | 100.0% | – |",
    "| himap | int8 | 50.0% (0.0% to 100.0%) | 50.0% | 68.8% | 50.0% | -50.0% (-100.0% to +0.0%) |",
  ]


def test_questions_about_one_picture_count_together(tmp_path):
  of_one = [own._replace(image=pathlib.Path("a.png")) for own in QUESTIONS]
  changed = [ROWS[0], ROWS[1] | {"answer": "c"}]
  own = compare.rows("himap", {"float32": read(tmp_path, ROWS), "int8": read(tmp_path, changed)}, of_one)[1]
  assert own["same_answer_low"] == own["same_answer"] == own["same_answer_high"] == 0.5


def test_without_pruning_without_known_answers_and_without_any_answer(tmp_path):
  unknown = [own._replace(answer="") for own in QUESTIONS]
  answers = {row["id"]: row | {"kept": []} for row in ROWS[:2]}
  own = compare.rows("none", {"float32": answers, "int8": answers}, unknown)[1]
  assert own["same_answer"] == 1.0 and {"right", "difference", "same_kept", "overlap"}.isdisjoint(own)
  with pytest.raises(UserError, match="none: no question was answered with all forms"):
    compare.rows("none", {"float32": answers, "int8": {}}, QUESTIONS)


@pytest.mark.sampled(of="commands of studies")
@pytest.mark.slow
def test_dtypes_of_a_tiny_checkpoint(checkpoints, images, tmp_path):
  images[0].save(tmp_path / "a.png")
  questions = [Question(str(number), tmp_path / "a.png", "Why?" * number, "", "", "") for number in (1, 2)]
  rows = [{"id": own.id, "image": str(own.image), "question": own.question} for own in questions]
  config = RunConfig(
    checkpoint=str(checkpoints("clip_mha").directory),
    prompts=write(tmp_path / "prompts.jsonl", rows),
    output=tmp_path / "answers.jsonl",
    generation=GenerationConfig(2),
    inputs=InputConfig("<image>{question}", prompt_buckets=(16,), batch_size=2),
  )
  table = measure(config, ["fastervlm"], questions, tmp_path)
  assert [(row["method"], row["weights"], row["questions"]) for row in table] == [
    ("fastervlm", "float32", 2),
    ("fastervlm", "bfloat16", 2),
    ("fastervlm", "int8", 2),
  ]
  assert all(row["overlap"] > 0.5 for row in table[1:])


@pytest.mark.sampled(of="commands of studies")
def test_flags_that_it_would_ignore_and_questions_of_others(checkpoints, images, tmp_path):
  images[0].save(tmp_path / "a.png")
  row = {"image": str(tmp_path / "a.png"), "answer": "a", "type": "", "question": "Why?"}
  write(tmp_path / "questions.jsonl", [row | {"id": str(number)} for number in range(3)])

  def run(*arguments):
    named = {"checkpoint": checkpoints("clip_mha").directory, "question_set": tmp_path / "questions.jsonl"}
    named |= {"workdir": tmp_path / "work", "output": tmp_path / "output"}
    command = commands.Command(
      "experiments.dtypes", *(f"--{name}={value}" for name, value in named.items()), *arguments
    )
    return command.communicate()[1].splitlines()[-1], command.process.exitcode

  line, status = run("--prune_layers=1,4", "--restore")
  assert status == 2 and "--prune_layers, --restore: every form of weights is tried" in line
  line, status = run("--methods=none,himap")  # whose layers the checkpoint does not have
  assert status == 2 and "cannot prune before layer 8" in line and not list((tmp_path / "work").glob("none*"))
  line, status = run("--methods=himap", "--num_questions=2")
  assert status == 2 and "made with other settings (questions" in line
