"""The demo model: the README's first command as a real process, and transformers on the same checkpoint."""

import json
import os
import pathlib
import re
import subprocess
import sys

import jax.numpy as jnp
import pytest
import torch
import transformers
from PIL import Image

import himap_jax
from himap_jax import checkpoint

ROOT = pathlib.Path(__file__).parents[2]
DEMO = ROOT / "experiments" / "demo"


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory):
  output = tmp_path_factory.mktemp("demo")
  command = [
    sys.executable,
    "-m",
    "himap_jax.run",
    "--flagfile=experiments/flags/demo.flags",
    f"--output={output / 'answers.jsonl'}",
    f"--pictures={output / 'pictures'}",
  ]
  of_tests = ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS")
  environment = {name: value for name, value in os.environ.items() if name not in of_tests}
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
  assert done.returncode == 0, done.stderr
  rows = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
  return {row["id"]: row for row in rows}, output / "pictures", done.stdout


def prompts():
  return [json.loads(line) for line in (DEMO / "prompts.jsonl").read_text().splitlines()]


def test_every_prompt_has_an_answer_and_a_picture(demo_run):
  rows, pictures, table = demo_run
  assert set(rows) == {prompt["id"] for prompt in prompts()}
  for row in rows.values():
    assert row["error"] is None and row["answer"]
    assert [len(stage) for stage in row["kept"]] == [288, 72]
    with Image.open(pictures / f"{row['id']}.png") as picture:
      assert picture.width > 3 * 336
  assert "6 answered, 0 errors" in table and "23.5% of no pruning" in table


def answers_of(name, sample):
  """The first prompts' pictures, and the answers of a checkpoint."""
  images = [Image.open(DEMO / prompt["image"]).convert("RGB") for prompt in sample]
  return images, himap_jax.generate(
    himap_jax.load(name, dtype=jnp.float32),
    images,
    [prompt["question"] for prompt in sample],
    generation=himap_jax.GenerationConfig(max_new_tokens=6),
    inputs=himap_jax.InputConfig(batch_size=len(sample), prompt_buckets=(64,)),
  )


@pytest.mark.sampled(of="demos")
def test_the_second_model_answers_by_cross_attention():
  _, answers = answers_of("demo_cross", prompts()[:3])
  assert [answer.text for answer in answers] == ["blue", "circle", "triangle"]
  assert checkpoint.open_checkpoint("demo_cross").config.text.cross_attention_layers


@pytest.mark.sampled(of="demos")
def test_the_readme_s_lines_of_python(monkeypatch, capsys):
  (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
  monkeypatch.chdir(ROOT)
  exec(compile(code, "README.md", "exec"), {})
  printed = capsys.readouterr().out
  assert re.match(r"triangle \[[\d, ]+\]\n$", printed) and len(re.findall(r"\d+", printed)) == 72


@pytest.mark.sampled(of="demos")
def test_transformers_answers_the_same():
  sample = prompts()[:2]
  images, ours = answers_of("demo", sample)
  directory = checkpoint.default_cache_dir() / "demo"
  model = transformers.LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
  processor = transformers.AutoProcessor.from_pretrained(directory)
  for image, prompt, answer in zip(images, sample, ours, strict=True):
    text = processor.apply_chat_template(
      [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt["question"]}]}],
      add_generation_prompt=True,
    )
    inputs = processor(images=image, text=text, return_tensors="pt")
    with torch.no_grad():
      theirs = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert theirs[0, inputs["input_ids"].shape[1] :].tolist() == answer.token_ids
