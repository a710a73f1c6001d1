"""The campaign in short, with another seed every time."""

import json
import pathlib
import secrets

import pytest
from campaign import trials
from campaign.parts import PARTS

from himap_jax.errors import UserError

TRIALS = dict.fromkeys((name for name in PARTS if name != "soak"), 1) | {"hostile": 2}


@pytest.mark.parametrize("name", TRIALS)
def test_short_form(name, tmp_path):
  seed = secrets.randbelow(1 << 31)
  print(f"python -m tests.campaign --part={name} --seed={seed} --trials={TRIALS[name]}")  # shown if it fails
  done = trials.run(PARTS[name], tmp_path / name, num_trials=TRIALS[name], seed=seed)
  assert [row for row in done if row["outcome"] == trials.FAILED] == []


def counted(shared: pathlib.Path):
  """A part whose trials draw a number, and fail above 0.7."""
  (shared / "prepared").touch()

  def trial(random, directory):
    assert directory.is_dir() and not list(directory.iterdir())
    drawn = random.random()
    assert drawn < 0.7, drawn
    return "below 0.3" if drawn < 0.3 else "above"

  return trial


def test_trials_continue_repeat_and_are_counted(tmp_path, capsys):
  part = trials.Part("Numbers are small.", counted, inputs=10)
  whole = trials.run(part, tmp_path / "whole", num_trials=12, seed=3)
  trials.run(part, tmp_path / "parts", num_trials=5, seed=3)
  with open(tmp_path / "parts" / "trials.jsonl", "a") as lines:
    lines.write('{"trial": 5, "sec')  # killed while it wrote
  continued = trials.run(part, tmp_path / "parts", num_trials=12, seed=3)
  outcomes = [row["outcome"] for row in whole]
  assert outcomes == [row["outcome"] for row in continued] and len(set(outcomes)) == 3
  with pytest.raises(UserError, match="seed was 3, now 4"):
    trials.run(part, tmp_path / "parts", num_trials=12, seed=4)
  failed = outcomes.index(trials.FAILED)
  assert f"--only={failed}" in capsys.readouterr().err
  (repeated,) = trials.run(part, tmp_path / "whole", num_trials=12, seed=3, only=failed)
  assert repeated["error"] == whole[failed]["error"]
  assert len((tmp_path / "whole" / "trials.jsonl").read_text().splitlines()) == 12
  text = trials.table(part, whole)
  assert "120 tried" in text and f"| {trials.FAILED} | {outcomes.count(trials.FAILED)} |" in text
  assert json.loads((tmp_path / "parts" / "trials.jsonl").read_text().splitlines()[4])["trial"] == 4
