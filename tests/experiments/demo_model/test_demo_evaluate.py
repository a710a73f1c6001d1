"""The evaluation runs the same command as everyone, and counts what it answers."""

import json
import pathlib
import subprocess
import sys

import himap_jax
from himap_jax.run.pictures import load_image

ROOT = pathlib.Path(__file__).parents[3]


def test_right_and_wrong(loaded, images, tmp_path):
  images[0].save(tmp_path / "0.png")
  picture, generation = load_image(tmp_path / "0.png"), himap_jax.GenerationConfig(4)
  (answer,) = himap_jax.generate(loaded("clip_mha"), [picture], ["Why?"], generation=generation)
  answers = {"a": answer.text, "b": f"not {answer.text}", "c": answer.text.upper()}
  rows = [
    {"id": name, "image": "0.png", "question": "Why?", "answer": text, "type": "why", "guess": ""}
    for name, text in answers.items()
  ]
  (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  arguments = [
    f"--question_set={tmp_path / 'questions.jsonl'}", f"--checkpoint={loaded('clip_mha').directory}", "--dtype=float32",
    "--methods=none", f"--workdir={tmp_path / 'work'}", "--compilation_cache_dir=",
  ]  # fmt: skip
  command = [sys.executable, "-m", "experiments.demo_model.evaluate", *arguments]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  row = next(line for line in done.stdout.splitlines() if "none" in line and "%" in line)
  assert "66.67%" in row
  output = map(json.loads, (tmp_path / "work" / "none.jsonl").read_text().splitlines())
  assert {row["answer"] for row in output} == {answer.text}
