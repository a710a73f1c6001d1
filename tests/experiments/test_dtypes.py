"""The comparison of dtypes, on rows written by hand and on a tiny checkpoint."""

import json

import running

from experiments.dtypes import compare
from experiments.dtypes.__main__ import measure

ROWS = [
  {"id": 1, "answer": "a", "kept": [[0, 1, 2, 3], [0, 1]], "error": None},
  {"id": 2, "answer": "b", "kept": [[4, 5, 6, 7], [4, 5]], "error": None},
  {"id": 3, "answer": None, "error": "damaged"},
]


def test_agreement_of_rows(tmp_path):
  changed = [ROWS[0], ROWS[1] | {"answer": "c", "kept": [[4, 5, 6, 0], [0, 1]]}, ROWS[2]]
  running.write_rows(tmp_path / "one.jsonl", ROWS)
  running.write_rows(tmp_path / "two.jsonl", changed)
  own = compare.agreement(compare.read(tmp_path / "one.jsonl"), compare.read(tmp_path / "two.jsonl"))
  assert own == compare.Agreement(num_rows=2, same_answers=0.5, same_kept=0.5, overlap=(1 + 1 + 0.75 + 0) / 4)
  unpruned = {row["id"]: row | {"kept": []} for row in ROWS[:2]}
  assert compare.agreement(unpruned, unpruned) == compare.Agreement(2, 1.0, None, None)
  assert "| himap | int8 | 2 | 50.0% | 50.0% | 68.8% |" in compare.table([("himap", "int8", own)])


def test_dtypes_of_a_tiny_checkpoint(checkpoints, images, tmp_path):
  config = running.make_config(tmp_path, checkpoints(running.NAME).directory, images, tmp_path)
  found = measure(config, ["fastervlm"], tmp_path)
  assert [(method, form, own.num_rows) for method, form, own in found] == [
    ("fastervlm", "bfloat16", len(running.QUESTIONS)),
    ("fastervlm", "int8", len(running.QUESTIONS)),
  ]
  assert all(own.overlap > 0.5 for _, _, own in found)
  kept = [json.loads(line)["kept"] for line in (tmp_path / "fastervlm_float32.jsonl").read_text().splitlines()]
  assert all(kept)
