"""The studies of a model's flow as commands: what they write, what they leave out, and that they resume."""

import csv
import json
from typing import NamedTuple

import commands
import numpy as np
import pytest


class Command(NamedTuple):
  """A command, and what is expected of it.

  Attributes:
    arguments: its own.
    asked: what it says of how much it asked.
    kept: what its work directory holds of a run.
    num_kept: how many of them.
    written: what its output directory holds.
  """

  arguments: tuple[str, ...]
  asked: str
  kept: str
  num_kept: int
  written: set[str]


COMMANDS = {
  "saliency": Command(
    ("--layers_at_a_time=4",),
    "3 questions",
    "flow-*.npz",
    2,
    {"saliency.csv", "contributions.csv", "depth.csv", "saliency.md", "saliency.png", "contributions.png"}
    | {"maps_to_instruction.png", "maps_to_image.png"},
  ),
  "disruption": Command(
    ("--layers=1,3", "--how=mean", "--chosen=block"),
    "3 questions",
    "outcome-*.npz",
    2,
    {"disruption.csv", "bias.csv", "disruption.md", "disruption.png", "bias.png"},
  ),
  "importance": Command(
    ("--num_pairs=2", "--prune_layers=1,3", "--keep=8,3"),
    "1 pairs",
    "answers-*.json",
    7,
    {"importance.csv", "correlations.csv", "importance.md"},
  ),
  "calibrate": Command(
    ("--budget=60%", "--num_tried=1", "--layers_at_a_time=4", "--disrupted_layers=0,3", "--max_new_tokens=2"),
    "3 questions",
    "scores-*.npz",
    2,
    {"calibrate.csv", "calibrate.md", "schedule.json"},
  ),
  "adaptive": Command(
    ("--ladder=4/2,12/6", "--prune_layers=1,3", "--thresholds=0.5", "--max_new_tokens=2"),
    "3 questions",
    "held-*.npz",
    2,
    {"adaptive.csv", "adaptive.md", "adaptive.png"},
  ),
  "rank_layers": Command((), "3 questions", "layers-*.npz", 2, {"rank_layers.csv", "rank_layers.md"}),
}

RESUMED = ("saliency", "importance")  # which keep arrays and answers; the others keep them in the same way


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
  """A cache of compiled programs that all commands share."""
  return tmp_path_factory.mktemp("compiled")


@pytest.mark.sampled(of="commands of studies")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command(name, checkpoints, images, compiled, tmp_path):
  own, rows = COMMANDS[name], []
  for number, image in enumerate(images[:3]):
    image.save(tmp_path / f"{number}.png")
    answer = f"{number // 2}"
    rows.append({"id": f"q{number}", "image": f"{number}.png", "question": "Why?", "answer": answer, "type": "why"})
  rows.append({"id": "broken", "image": "none.png", "question": "Why?", "answer": "yes", "type": "why"})
  (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  common = (
    f"--checkpoint={checkpoints('dinov2_shrunk').directory}", "--batch_size=2", "--prompt_buckets=40",
    "--prompt_template=<image>{question}", f"--compilation_cache_dir={compiled}",
  )  # fmt: skip

  def run(module, *arguments):
    command = commands.Command(module, *common, *arguments)
    return command.succeeded(), command.text()[1]

  command = [
    f"experiments.flow.{name}", f"--question_set={tmp_path / 'questions.jsonl'}", f"--workdir={tmp_path / 'work'}",
    f"--output={tmp_path / 'out'}", *own.arguments,
  ]  # fmt: skip
  first, errors = run(*command)
  assert own.asked in first and "broken is left out" in errors
  files = sorted((tmp_path / "work").glob(own.kept))
  assert len(files) == own.num_kept
  if name == "disruption":  # the row that fills a batch does not count
    sums = np.load(tmp_path / "work" / "sums.npz")
    assert sums["count"][0] == sums["count"][16] == sums["count"].max() == 3  # the first image token, the last token
  if name in RESUMED:
    files[1].unlink()
    before = files[0].stat().st_mtime_ns
    again, _ = run(*command)
    assert files[0].stat().st_mtime_ns == before and files[1].exists()
    assert again == first
  assert {path.name for path in (tmp_path / "out").iterdir()} == own.written
  if name == "calibrate":
    path = tmp_path / "out" / "schedule.json"
    assert "proposal 1" in first
    run(
      "himap_jax.run", f"--schedule={path}", f"--prompts={tmp_path / 'questions.jsonl'}", f"--image_dir={tmp_path}",
      f"--output={tmp_path / 'answers.jsonl'}", "--emit=kept", "--max_new_tokens=2",
    )  # fmt: skip
    answers = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    kept = {row["id"]: [len(stage) for stage in row.get("kept", ())] for row in answers}
    keep = json.loads(path.read_text())["keep"]
    assert kept == {"q0": keep, "q1": keep, "q2": keep, "broken": []}


CROSS_COMMANDS = {
  "saliency": (
    ("--layers_at_a_time=7", "--map_layers=3"),
    "S_vv and its ratio to S_vt do not exist",
    {"saliency.csv", "contributions.csv", "depth.csv", "saliency.md", "saliency.png", "contributions.png"},
  ),
  "disruption": (
    ("--layers=3", "--how=mask", "--chosen=block"),
    "there is no bias ratio",
    {"disruption.csv", "disruption.md", "disruption.png"},
  ),
}


@pytest.mark.sampled(of="commands of studies")
@pytest.mark.parametrize("name", CROSS_COMMANDS)
def test_a_command_on_a_model_with_cross_attention(name, mllama, images, compiled, tmp_path):
  arguments, said, written = CROSS_COMMANDS[name]
  images[0].save(tmp_path / "0.png")
  row = {"id": "q", "image": "0.png", "question": "Why?", "answer": "0", "type": "why"}
  (tmp_path / "questions.jsonl").write_text(json.dumps(row) + "\n")
  command = commands.Command(
    f"experiments.flow.{name}", f"--checkpoint={mllama.directory}", "--prompt_buckets=40",
    "--prompt_template=<image>{question}", f"--question_set={tmp_path / 'questions.jsonl'}",
    f"--workdir={tmp_path / 'work'}", f"--output={tmp_path / 'out'}", f"--compilation_cache_dir={compiled}", *arguments,
  )  # fmt: skip
  assert said in command.succeeded()
  assert {path.name for path in (tmp_path / "out").iterdir()} == written
  if name == "saliency":
    rows = list(csv.DictReader((tmp_path / "out" / "saliency.csv").read_text().splitlines()))
    found = [(row["layer"], row["block"]) for row in rows if row["by_pair"] and row["block"].startswith("image")]
    assert found == [(layer, "image→instruction") for layer in "135"]
  else:
    rows = list(csv.DictReader((tmp_path / "out" / "disruption.csv").read_text().splitlines()))
    assert [(row["intervention"], row["mode"]) for row in rows] == [
      ("image→instruction, mask", mode) for mode in ("single", "onward")
    ]
