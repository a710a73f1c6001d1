"""The comparison of dtypes, on rows written by hand and on a tiny checkpoint."""

import json

import commands
import pytest

from experiments.dtypes import compare
from experiments.dtypes.__main__ import measure
from himap_jax import GenerationConfig, InputConfig
from himap_jax.run.config import RunConfig

ROWS = [
  {"id": 1, "answer": "a", "kept": [[0, 1, 2, 3], [0, 1]], "error": None},
  {"id": 2, "answer": "b", "kept": [[4, 5, 6, 7], [4, 5]], "error": None},
  {"id": 3, "answer": None, "error": "damaged"},
]


def write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def test_agreement_of_rows(tmp_path):
  changed = [ROWS[0], ROWS[1] | {"answer": "c", "kept": [[4, 5, 6, 0], [0, 1]]}, ROWS[2]]
  one, two = (compare.read(write(tmp_path / "rows.jsonl", rows)) for rows in (ROWS, changed))
  own = compare.agreement(one, two)
  assert own == compare.Agreement(num_rows=2, same_answers=0.5, same_kept=0.5, overlap=(1 + 1 + 0.75 + 0) / 4)
  unpruned = {row["id"]: row | {"kept": []} for row in ROWS[:2]}
  assert compare.agreement(unpruned, unpruned) == compare.Agreement(2, 1.0, None, None)
  assert "| himap | int8 | 2 | 50.0% | 50.0% | 68.8% |" in compare.table([("himap", "int8", own)])


@pytest.mark.sampled(of="commands of studies")
@pytest.mark.slow
def test_dtypes_of_a_tiny_checkpoint(checkpoints, images, tmp_path):
  images[0].save(tmp_path / "a.png")
  rows = [{"id": number, "image": str(tmp_path / "a.png"), "question": "Why?" * number} for number in (1, 2)]
  config = RunConfig(
    checkpoint=str(checkpoints("clip_mha").directory),
    prompts=write(tmp_path / "prompts.jsonl", rows),
    output=tmp_path / "answers.jsonl",
    generation=GenerationConfig(2),
    inputs=InputConfig("<image>{question}", prompt_buckets=(16,), batch_size=2),
  )
  found = measure(config, ["fastervlm"], tmp_path)
  assert [(method, form, own.num_rows) for method, form, own in found] == [
    ("fastervlm", "bfloat16", 2),
    ("fastervlm", "int8", 2),
  ]
  assert all(own.overlap > 0.5 for _, _, own in found)


@pytest.mark.sampled(of="commands of studies")
def test_flags_that_it_would_ignore_and_questions_of_others(checkpoints, images, tmp_path):
  images[0].save(tmp_path / "a.png")
  row = {"image": str(tmp_path / "a.png"), "answer": "a", "type": "", "question": "Why?"}
  write(tmp_path / "questions.jsonl", [row | {"id": str(number)} for number in range(3)])

  def run(*arguments):
    named = {"checkpoint": checkpoints("clip_mha").directory, "questions": tmp_path / "questions.jsonl"}
    given = [f"--{name}={value}" for name, value in named.items()]
    command = commands.Command("experiments.dtypes", *given, f"--workdir={tmp_path / 'work'}", *arguments)
    return command.communicate()[1].splitlines()[-1], command.process.exitcode

  line, status = run("--prune_layers=1,4", "--restore")
  assert status == 2 and "--prune_layers, --restore: every form of weights is tried" in line
  line, status = run("--methods=none,himap")  # whose layers the checkpoint does not have
  assert status == 2 and "cannot prune before layer 8" in line and not list((tmp_path / "work").glob("none*"))
  line, status = run("--methods=himap", "--num_questions=2")
  assert status == 2 and "made with other settings (questions" in line
