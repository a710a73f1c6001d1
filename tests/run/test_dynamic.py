"""A run on a model whose pictures have their own numbers of image tokens: shapes, padding, rows, limits, errors."""

import base64
import json

import numpy as np
import pytest
import tiny_qwen2_vl
from running import changed, make_config, num_programs, read, write_rows
from tiny_checkpoints import noise_image

import himap_jax
from himap_jax import checkpoint
from himap_jax.families.family import Message
from himap_jax.run import job
from himap_jax.run.pictures import PictureFiles

# Rows of no picture, one and three, of many sizes.
SIZES = [(), ((40, 40),), ((90, 30), (16, 16), (33, 60)), ((41, 39),), ((64, 48),), ((60, 50),), ((30, 91),), ((8, 8),)]
SHARES = ((1, 2), (0.5, 0.25))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  return tiny_qwen2_vl.make("qwen2_5_vl", tmp_path_factory.mktemp("qwen2_5_vl"))


@pytest.fixture
def config(tiny, images, cache, tmp_path, monkeypatch):
  monkeypatch.setenv("COLUMNS", "200")
  config = make_config(tmp_path, tiny.directory, images, cache)
  rows = []
  for number, sizes in enumerate(SIZES):
    names = [f"{number}-{place}.png" for place in range(len(sizes))]
    for place, (name, size) in enumerate(zip(names, sizes, strict=True)):
      noise_image(size, 10 * number + place).save(tmp_path / name)
    rows.append({"id": number, "image": names, "question": f"What is number {number}?"})
  write_rows(config.prompts, rows)
  own = dict(prune_layers=SHARES[0], keep=SHARES[1], prompt_template="chat", prompt_buckets=(160,), batch_size=2)
  return changed(config, **own, max_new_tokens=3, ignore_eos=True, emit=frozenset({"tokens", "kept", "patches"}))


def alone(config, rows, questions):
  """What the library answers to each row by itself."""
  loaded = checkpoint.load(config.checkpoint, dtype="float32", cache_dir=config.output.parent / "cache")
  schedule, inputs = loaded.schedule("himap", *SHARES), himap_jax.InputConfig("chat", (160,), 1)
  generation = himap_jax.GenerationConfig(3, ignore_eos=True)
  options = dict(schedule=schedule, generation=generation, inputs=inputs)
  return [himap_jax.generate(loaded, [own], [text], **options)[0] for own, text in zip(rows, questions, strict=True)]


def test_rows_of_many_sizes(config, capsys):
  """Each as alone; three programs for each of the few shapes, and little padding."""
  assert job.run(config) == 0
  printed, rows = capsys.readouterr(), read(config.output)
  files = PictureFiles(config.image_dir)
  pictures = [[files.load(f"{row}-{place}.png")[0] for place in range(len(own))] for row, own in enumerate(SIZES)]
  compared = (0, 1, 2)
  expected = alone(config, [pictures[row] for row in compared], [f"What is number {row}?" for row in compared])
  for row, answer in zip(compared, expected, strict=True):
    assert (rows[row]["token_ids"], rows[row]["kept"]) == (answer.token_ids, answer.kept)
  assert all(row["error"] is None for row in rows.values()) and len(rows) == len(SIZES)
  kept = rows[2]["kept_patches"][0]
  assert len(kept) == len(rows[2]["kept"][0]) and {place[0] for place in kept} <= {0, 1, 2}
  counts = next(line for line in printed.err.splitlines() if line.startswith("image tokens: 0, ")).split(", ")
  assert 3 <= len(counts) < len({sum(np.prod(size) for size in own) for own in SIZES})
  assert num_programs(printed.out) <= 3 * len(counts) and "of the prompts' slots" in printed.out


def test_new_pictures_in_the_same_shapes_compile_nothing(config, capsys):
  assert job.run(config) == 0
  capsys.readouterr()
  rows = [json.loads(line) for line in config.prompts.read_text().splitlines()]
  write_rows(config.prompts, [row | {"id": f"again {row['id']}", "question": "Why?"} for row in rows])
  assert job.run(changed(config, resume=False)) == 0
  assert num_programs(capsys.readouterr().out) == 0  # engines share what they compiled


@pytest.mark.sampled(of="runs")
def test_a_limit_of_image_tokens(config):
  write_rows(config.prompts, [json.loads(config.prompts.read_text().splitlines()[row]) for row in (1, 4, 6)])
  assert job.run(changed(config, max_image_tokens=9, keep=(1.0, 1.0))) == 0
  rows = read(config.output)
  assert len(rows) == 3 and max(len(row["kept"][0]) for row in rows.values()) <= 9
  with pytest.raises(himap_jax.UserError, match="max_image_tokens was 9, now None"):
    job.run(changed(config, keep=(1.0, 1.0)))


@pytest.mark.sampled(of="runs")
def test_conversations_and_pictures_in_the_row(config, tmp_path):
  data = base64.b64encode((tmp_path / "1-0.png").read_bytes()).decode()
  content = [
    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
    {"type": "text", "text": "A?"},
  ]
  messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "B."}]
  messages.append({"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "image", "path": "4-0.png"}]})
  messages[-1]["content"].append({"type": "text", "text": "?"})
  bad = [
    ({"messages": messages, "question": "?"}, '"question" and "messages" together'),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "is missing"),
    ({"image": ["1-0.png"], "question": "<image> or <image>?"}, "this one has 2 for 1 picture"),
    ({"image": "strip.png", "question": "?"}, "one side may be at most 200 times the other"),
    ({"image": ["4-0.png"] * 40, "question": "?"}, "context of 512 tokens does not hold"),
    ({"image": "https://localhost/a.png", "question": "?"}, "with --allow_urls only"),
  ]
  noise_image((10_000, 1), 0).save(tmp_path / "strip.png")
  write_rows(
    config.prompts, [{"id": "chat", "messages": messages}, *({"id": n} | row for n, (row, _) in enumerate(bad))]
  )
  assert job.run(config) == 0
  rows, files = read(config.output), PictureFiles(tmp_path)
  conversation = [Message("user", "<image>A?"), Message("assistant", "B."), Message("user", "And <image>?")]
  (expected,) = alone(config, [[files.load(name)[0] for name in ("1-0.png", "4-0.png")]], [conversation])
  assert (rows["chat"]["token_ids"], rows["chat"]["kept"]) == (expected.token_ids, expected.kept)
  for number, (_, message) in enumerate(bad):
    assert message in rows[number]["error"] and "\n" not in rows[number]["error"]
