"""The soak on a tiny checkpoint."""

import json

import pytest
from campaign import soak, trials


@pytest.mark.sampled(of="commands of studies")
def test_equal_answers_are_measured_and_others_fail(checkpoints, tmp_path, monkeypatch):
  monkeypatch.setenv("HIMAP_JAX_CACHE", str(tmp_path / "cache"))
  part = soak.part(str(checkpoints("clip_mha").directory), 12)
  done = trials.run(part, tmp_path, num_trials=4, seed=0)
  assert [row["outcome"] for row in done] == ["equal answers"] * 4, done
  measured = [json.loads(line) for line in (tmp_path / "shared" / soak.MEASURES).read_text().splitlines()]
  assert [line["rows"] for line in measured] == [12] * 4
  assert len({line["open_files"] for line in measured[1:]}) == 1
  first = tmp_path / "shared" / "first.json"
  answers = json.loads(first.read_text())
  assert len({answer for answer, *_ in answers.values()}) > 3
  first.write_text(json.dumps(answers | {"5": ["another", None, "", []]}))
  (changed,) = trials.run(part, tmp_path, num_trials=4, seed=0, only=2)
  assert changed["outcome"] == trials.FAILED and "['5']" in changed["error"]


def test_the_slope(tmp_path):
  """10 MB in 1,000 rows, of the last process alone and without its first trial."""
  lines = [
    {"process": process, "rows": 500, "seconds": 50, "resident_mb": memory, "open_files": 9}
    for process, memory in ((1, 0), (1, 9), (2, 0), (2, 100), (2, 105), (2, 110))
  ]
  (tmp_path / soak.MEASURES).write_text("\n".join(map(json.dumps, lines)))
  text = soak.summary(tmp_path)
  assert "| rows | 1,500 |" in text and "100 to 110 MB, +10.00 MB per 1,000 rows" in text
  assert "| open files | 9 to 9 |" in text and "10.00 to 10.00 rows/s, +0%" in text
