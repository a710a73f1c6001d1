"""The command end to end: answers, every kind of bad input, flags, and processes that are killed and started again."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import commands
import jax
import numpy as np
import pytest
import running
import tiny_checkpoints
from absl import flags
from absl.testing import flagsaver
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image
from running import changed, read, write_rows
from safetensors.numpy import load_file, save_file

import himap_jax
from checkpoints_convert.errors import CheckpointError
from himap_jax import Sampling, UserError
from himap_jax.checkpoint import OpenCheckpoint
from himap_jax.engine import capacity
from himap_jax.engine.accounting import model_sizes
from himap_jax.engine.batching import Bucket
from himap_jax.engine.capacity import Capacity
from himap_jax.pruning.cost import costs
from himap_jax.run import __main__ as command
from himap_jax.run import job
from himap_jax.run.answering import Prepared, Reader
from himap_jax.run.flags import config_from_flags
from himap_jax.run.pictures import load_image
from himap_jax.run.prompts import Columns, Prompt

ROOT = pathlib.Path(__file__).parents[2]
NAME = running.NAME
N, NUM_LAYERS, VOCAB = 16, 4, 272
MAX_NEW, PRUNE_LAYERS, KEEP, QUESTIONS = running.MAX_NEW, running.PRUNE_LAYERS, running.KEEP, running.QUESTIONS
FLAGS = (
    "checkpoint", "[no]allow_pickle", "prompts", "split", "columns", "image_dir", "output", "method", "prune_layers", "keep", "max_new_tokens", "temperature",
    "top_p", "seed", "[no]ignore_eos", "batch_size", "prompt_buckets", "prompt_template", "image_aspect_ratio", "dtype", "emit", "[no]resume",
    "compilation_cache_dir", "[no]strict", "pictures", "profile_dir", "method_parameters", "schedule", "[no]restore",
    "[no]int8_weights", "mesh", "[no]distributed", "coordinator", "num_processes", "process_id",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def compilation_cache_of_this_module_alone():
  names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
  before = {name: getattr(jax.config, name) for name in names}
  compilation_cache.reset_cache()
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


def answers_of(config, **changes):
  """The output of a run, in a file of its own."""
  config = changed(config, output=config.output.with_name("other.jsonl"), resume=False, **changes)
  assert job.run(config) == 0
  return read(config.output)


class TestAnswers:
  def test_rows_are_those_of_the_library(self, config, loaded, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # so that the table is not wrapped
    emit = frozenset({"tokens", "kept", "counts", "logits", "timing"})
    pictures = tmp_path / "deep" / "pictures"
    assert job.run(changed(config, emit=emit, pictures=pictures, strict=True)) == 0
    rows = read(config.output)
    expected = himap_jax.generate(
      loaded(NAME, batch_size=2),
      [load_image(tmp_path / f"{index}.png") for index in range(4)],
      list(QUESTIONS.values()),
      schedule=loaded(NAME).schedule("himap", PRUNE_LAYERS, KEEP),
      generation=himap_jax.GenerationConfig(max_new_tokens=MAX_NEW),
      inputs=himap_jax.InputConfig("<image>{question}", prompt_buckets=(40,), batch_size=2),
    )
    assert rows.keys() == QUESTIONS.keys()
    for row, answer in zip((rows[row_id] for row_id in QUESTIONS), expected, strict=True):
      assert list(row) == ["id", "answer", "error", "digest", "token_ids", "kept", "counts", "first_logits", "timing"]
      example = (
        loaded(NAME).prompts("<image>{question}").prepare([load_image(tmp_path / "0.png")], QUESTIONS[row["id"]])
      )
      text = len(example.tokens) - N
      assert row["counts"] == {"tiles": 1, "image_tokens": N, "text_tokens": text, "kept": list(KEEP)}
      assert (row["answer"], row["error"]) == (answer.text, None)
      assert row["token_ids"] == answer.token_ids
      assert 1 <= len(row["token_ids"]) <= MAX_NEW
      assert row["kept"] == answer.kept
      assert [len(stage) for stage in row["kept"]] == list(KEEP)
      assert set(row["kept"][1]) < set(row["kept"][0]) < set(range(N))
      assert all(stage == sorted(stage) for stage in row["kept"])
      assert len(row["first_logits"]) == VOCAB
      np.testing.assert_allclose(row["first_logits"], answer.first_logits, atol=1e-5, rtol=0)
      assert row["timing"].keys() == {"prefill_seconds", "decode_seconds"}
      assert min(row["timing"].values()) > 0
    assert sorted(path.name for path in pictures.iterdir()) == ["3.png", "4.png", "a.png", "b.png"]
    assert load_image(pictures / "3.png").size == (3 * (28 + 8) + 8, 28 + 16 + 2 * 8)

    table = capsys.readouterr().out
    for text in ("4 answered, 0 errors, 0 answered before", "rows/s", "device-hours for a million rows", "tokens/s", "himap",
                     "16, 8 from layer 2 on, 3 from layer 3 on", "HiMAP Eq. 10", "FLOPs on all tokens"):  # fmt: skip
      assert text in table
    assert running.num_programs(table) == 6  # for two buckets, of which the slots of each hold the other's rows

    before = config.output.read_bytes()
    assert job.run(changed(config, emit=emit)) == 0
    assert config.output.read_bytes() == before
    assert "0 answered, 0 errors, 4 answered before" in capsys.readouterr().out

  def test_restore(self, config, loaded, tmp_path):
    rows = answers_of(config, restore=True, emit=frozenset({"logits"}))
    expected = himap_jax.generate(
      loaded(NAME, batch_size=2),
      [load_image(tmp_path / f"{index}.png") for index in range(4)],
      list(QUESTIONS.values()),
      schedule=loaded(NAME).schedule("himap", PRUNE_LAYERS, KEEP, restore=True),
      generation=himap_jax.GenerationConfig(max_new_tokens=MAX_NEW),
      inputs=himap_jax.InputConfig("<image>{question}", prompt_buckets=(40,), batch_size=2),
    )
    for row_id, answer in zip(QUESTIONS, expected, strict=True):
      assert rows[row_id]["answer"] == answer.text
      np.testing.assert_allclose(rows[row_id]["first_logits"], answer.first_logits, atol=1e-5, rtol=0)

  def test_other_settings_do_not_mix_with_the_rows_of_an_output(self, config):
    assert job.run(config) == 0
    before = config.output.read_bytes()
    for changes, message in (
      ({"method": "none", "prune_layers": None, "keep": None}, "method was 'himap', now 'none'"),
      ({"keep": (7, 3)}, "keep was .8, 3., now .7, 3."),
      ({"sampling": Sampling(0.5)}, "sampling was"),
      ({"image_aspect_ratio": "pad"}, "image_aspect_ratio was 'checkpoint', now 'pad'"),
      ({"restore": True}, "restore was False, now True"),
    ):
      with pytest.raises(UserError, match=f"output.jsonl: made with other settings .*{message}.*--noresume"):
        job.run(changed(config, **changes))
      assert config.output.read_bytes() == before
    assert job.run(changed(config, batch_size=4, prompt_buckets=(40, 80))) == 0
    other = changed(config, keep=(7, 3), prompt_buckets=(64,), emit=frozenset({"kept"}))
    assert job.run(changed(other, resume=False)) == 0
    assert {len(row["kept"][0]) for row in read(config.output).values()} == {7}
    assert job.run(other) == 0

  def test_batches_and_buckets_change_nothing(self, config):
    emit = frozenset({"tokens", "kept"})
    expected = answers_of(config, emit=emit)
    assert answers_of(config, emit=emit, batch_size=3, prompt_buckets=(100,)) == expected

  def test_rows_that_keep_different_counts(self, config, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    emit, threshold = frozenset({"tokens", "kept"}), 0.52
    config = changed(config, prompt_buckets=(64,), batch_size=4, max_new_tokens=2)
    rungs = ((4, 1), (8, 2), (12, 6))
    fixed = [answers_of(config, emit=emit, keep=keep) for keep in rungs[:2]]
    capsys.readouterr()
    adaptive = changed(
      config, emit=emit, method="himap_adaptive", keep=rungs[-1], output=tmp_path / "adaptive.jsonl",
      parameters=(("threshold", threshold),),
    )  # fmt: skip
    assert job.run(adaptive) == 0
    rows = read(adaptive.output)
    assert rows.keys() == fixed[0].keys()
    kept = []
    for name, row in rows.items():
      kept.append(tuple(map(len, row["kept"])))
      expected = fixed[rungs.index(kept[-1])][name]
      assert row | {"digest": None} == expected | {"digest": None}
    assert set(kept) == set(rungs[:2])
    means = [sum(counts) / 4 for counts in zip(*kept, strict=True)]
    table = capsys.readouterr().out
    assert f"16, {means[0]:.4g} from layer 2 on, {means[1]:.4g} from layer 3 on" in table
    opened = config.open()
    sizes, schedule = model_sizes(opened.config, (28, 28)), config.pruning.schedule(NUM_LAYERS, N)
    flops = sum(costs(sizes, schedule.with_counts(counts), N, 0).image_tokens for counts in kept)
    share = flops / 4 / costs(sizes, himap_jax.Schedule(), N, 0).image_tokens
    assert f"{share:.1%} of no pruning" in table.split("HiMAP Eq. 10")[1].split("\n")[0]
    with pytest.raises(
      UserError, match="made with other settings .method_parameters was .'threshold': 0.52., now .'thres"
    ):
      job.run(changed(adaptive, parameters=(("threshold", 0.7),)))

  def test_no_pruning(self, config):
    config = changed(config, prompt_buckets=(64,))
    rows = answers_of(config, method="none", prune_layers=None, keep=None, emit=frozenset({"kept"}))
    assert [row["kept"] for row in rows.values()] == [[]] * 4
    kept_all = answers_of(config, keep=(N, N))
    assert {row["id"]: row["answer"] for row in rows.values()} == {i: row["answer"] for i, row in kept_all.items()}

  def test_profile(self, config, tmp_path):
    job.run(changed(config, profile_dir=tmp_path / "profile"))
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    profile = trace.read_bytes()
    scopes = ("vision_tower", "projector", "prefill_layers_0_to_2", "prune_before_layer_2/score")
    for scope in (*scopes, "prune_before_layer_3/gather", "prefill_layers_3_to_4", "decode/"):
      assert scope.encode() in profile, scope

  def test_sampling_is_the_seed_s_alone(self, config):
    config = changed(
      config, sampling=Sampling(1.5, 0.9), emit=frozenset({"tokens"}), ignore_eos=True, prompt_buckets=(64,)
    )
    expected = answers_of(config, seed=1)
    assert all(len(row["token_ids"]) == MAX_NEW for row in expected.values())
    rows = list(map(json.loads, config.prompts.read_text().splitlines()))
    write_rows(config.prompts, rows[::-1])
    assert answers_of(config, seed=1) == expected
    write_rows(config.prompts, [rows[0] | {"id": 7}, rows[0] | {"id": "8"}])
    assert len({tuple(row["token_ids"]) for row in answers_of(config, seed=1).values()}) == 2
    write_rows(config.prompts, rows)
    other = answers_of(config, seed=2)
    assert sum(other[row_id] != row for row_id, row in expected.items()) >= 3


def save_bad_images(directory):
  """Pictures that cannot be answered, by name, each with a part of its error."""
  good = tiny_checkpoints.noise_image((40, 40), seed=0)
  good.save(directory / "whole.png")
  (directory / "truncated.png").write_bytes((directory / "whole.png").read_bytes()[:600])
  good.save(directory / "whole.jpg")
  (directory / "truncated.jpg").write_bytes((directory / "whole.jpg").read_bytes()[:500])
  (directory / "empty.png").touch()
  (directory / "text.png").write_text("not a picture")
  (directory / "directory.png").mkdir()
  Image.new("1", (20_000, 20_000)).save(directory / "large.png")
  Image.new("RGB", (1, 100_000)).save(directory / "tall.png")
  Image.new("RGB", (100_000, 1)).save(directory / "wide.png")
  return {
    "missing.png": "No such file",
    "truncated.png": "damaged image",
    "truncated.jpg": "damaged image",
    "empty.png": "the file is empty",
    "text.png": "not an image",
    "directory.png": "not a regular file",
    "large.png": "20000 x 20000 = 400,000,000 pixels is above the limit",
    "tall.png": "tall.png: the picture has 1 x 100000 pixels; one side may be at most 200 times",
    "wide.png": "wide.png: the picture has 100000 x 1 pixels; one side may be at most 200 times",
    "a\0b.png": "null",
    "x" * 300 + ".png": "File name too long",
  }


def save_odd_images(directory):
  """Pictures that look unusual and can be answered."""
  rgb = tiny_checkpoints.noise_image((40, 40), seed=0)
  rgb.save(directory / "animated.gif", save_all=True, append_images=[Image.new("RGB", (40, 40))])
  deep = np.asarray(rgb.convert("L")).astype(np.uint16) * 257
  Image.fromarray(deep).save(directory / "deep.png")
  rgb.convert("CMYK").save(directory / "cmyk.jpg")
  rgb.quantize(16).save(directory / "palette.png")
  rgb.convert("RGBA").save(directory / "transparent.png")
  return ("animated.gif", "deep.png", "cmyk.jpg", "palette.png", "transparent.png")


class TestBadRows:
  @pytest.fixture
  def bad(self, config, tmp_path):
    """A prompt file of good and bad rows; returns its config, the errors by id, and the ids that can be answered."""
    errors, lines = {}, []
    for name, error in save_bad_images(tmp_path).items():
      errors[f"image {name}"] = error
      lines.append(json.dumps({"id": f"image {name}", "image": name, "question": "Why?"}).encode())
    good = [f"image {name}" for name in save_odd_images(tmp_path)]
    lines += [json.dumps({"id": i, "image": i.removeprefix("image "), "question": "Why?"}).encode() for i in good]

    def row(row_id, **changes):
      lines.append(json.dumps({"id": row_id, "image": "0.png", "question": "Why?"} | changes).encode())

    row("question_file", image=str(tmp_path / "0.png"))
    lines[-1] = lines[-1].replace(b'"id"', b'"question_id"').replace(b'"question":', b'"text":')
    row("duplicate")
    row("duplicate", question="Again?")
    errors[f"line:{len(lines)}"] = "already used"
    row("../../escape")
    good += ["question_file", "duplicate", "../../escape"]
    for row_id, question, error in (
      ("long", "?" * 600, "601 text tokens; with 16 image tokens the model's context leaves room for 490"),
      ("two", "<image> and <image>", "one <image> for each picture, but this one has 2 for 1 picture"),
      ("empty", " ", '"question" is empty'),
      ("number", 3, '"question" must be a string'),
      ("absent", None, '"question" or "text" is missing'),
    ):
      row(row_id, question=question)
      errors[row_id] = error
    row("many", image=["0.png"] * 32)
    errors["many"] = "context of 512 tokens does not hold 512 image tokens and 6 new ones"
    row("three", image=["0.png"] * 3, question="<image> and <image>?")
    errors["three"] = "this one has 2 for 3 pictures"
    row("one is missing", image=["0.png", "nowhere.png"])
    errors["one is missing"] = "nowhere.png: No such file"
    row("several", image=["0.png", "1.png"])
    good.append("several")
    for line, error in (
      (b"{", "not valid JSON"),
      (b"[1]", "not a JSON object but a list"),
      (b'{"id": "latin", "image": "0.png", "question": "\xe9"}', "not UTF-8"),
      (b'{"image": "0.png", "question": "?"}', '"id" or "question_id" is missing'),
      (b'{"id": true, "image": "0.png", "question": "?"}', "must be a string or an integer"),
      (b'{"id": "x", "image": "0.p', "not valid JSON"),
    ):
      lines.append(line)
      errors[f"line:{len(lines)}"] = error
    config.prompts.write_bytes(b"\n".join(lines) + b"\n\n")
    return config, errors, good

  def test_each_is_its_row_s_error(self, bad, tmp_path):
    config, errors, good = bad
    pictures = tmp_path / "pictures"
    assert job.run(changed(config, pictures=pictures, emit=frozenset({"tokens"}))) == 0
    rows = read(config.output)
    assert rows.keys() == errors.keys() | set(good)
    for row_id, error in errors.items():
      assert list(rows[row_id]) == ["id", "answer", "error", "digest"]
      assert rows[row_id]["answer"] is None
      assert error in rows[row_id]["error"]
      assert "\n" not in rows[row_id]["error"]
    for row_id in good:
      assert rows[row_id]["error"] is None
      assert rows[row_id]["token_ids"]
    same = {"duplicate", "question_file", "image palette.png", "../../escape", "image transparent.png"}
    assert len({tuple(rows[row_id]["token_ids"]) for row_id in same - {"image palette.png"}}) == 1
    assert len(list(pictures.iterdir())) == len(good)

    with (tmp_path / "prompts.jsonl").open("ab") as file:
      file.write(b'{"id": "late", "image": "0.png", "question": "<image><image>"}\n')
    load_image(tmp_path / "0.png").save(tmp_path / "missing.png")
    assert rows["image missing.png"]["error"]
    assert job.run(changed(config, emit=frozenset({"tokens"}), strict=True)) == 1
    again = read(config.output)
    assert again.keys() == rows.keys() | {"late"}
    assert again.pop("late")["error"] and again.pop("image missing.png")["error"] is None
    assert all(again[row_id] == rows[row_id] for row_id in again)

  def test_rows_with_different_numbers_of_pictures(self, config, loaded, tmp_path, capsys, monkeypatch):
    """Each answer is the library's; shares are of a row's own tokens, and a row is stale if any picture changes."""
    monkeypatch.setenv("COLUMNS", "200")
    asked = [
      (["0.png", "1.png"], "Same?"),
      ("2.png", "Why?"),
      (["1.png", "3.png", "0.png"], "<image>a<image>b<image>?"),
      ([], "No picture?"),
    ]
    write_rows(config.prompts, [{"id": n, "image": own, "question": text} for n, (own, text) in enumerate(asked)])
    config = changed(
      config, keep=(0.5, 0.125), emit=frozenset({"tokens", "kept", "patches"}), pictures=tmp_path / "pictures"
    )
    assert job.run(config) == 0
    rows, table = read(config.output), capsys.readouterr().out
    expected = himap_jax.generate(
      loaded(NAME, batch_size=2),
      [[load_image(tmp_path / name) for name in ([own] if isinstance(own, str) else own)] for own, _ in asked],
      [text for _, text in asked],
      schedule=loaded(NAME).schedule("himap", PRUNE_LAYERS, (0.5, 0.125)),
      generation=himap_jax.GenerationConfig(max_new_tokens=MAX_NEW),
      inputs=himap_jax.InputConfig("<image>{question}", (40,), 2),
    )
    for number, answer in enumerate(expected):
      assert (rows[number]["token_ids"], rows[number]["kept"]) == (answer.token_ids, answer.kept)
    assert [list(map(len, rows[n]["kept"])) for n in range(4)] == [[16, 4], [8, 2], [24, 6], [0, 0]]
    for number in range(3):
      places = [[place // 16, 0, place % 16 // 4, place % 4] for place in rows[number]["kept"][1]]
      assert rows[number]["kept_patches"][1] == places
    assert "24, 12 from layer 2 on, 3 from layer 3 on" in table
    assert running.num_programs(table) == 12  # for four numbers of pictures
    assert sorted(path.name for path in config.pictures.iterdir()) == ["0.png", "1.png", "2.png"]
    width, height = 3 * (28 + 8) + 8, 28 + 16 + 8
    sizes = [load_image(config.pictures / f"{number}.png").size for number in range(3)]
    assert sizes == [(width, count * height + 8) for count in (2, 1, 3)]

    load_image(tmp_path / "2.png").save(tmp_path / "3.png")
    assert job.run(config) == 0
    assert "1 answered, 0 errors, 3 answered before" in capsys.readouterr().out
    again = read(config.output)
    assert again[0] == rows[0] and again[1] == rows[1] and again[2]["digest"] != rows[2]["digest"]
    write_rows(config.prompts, [{"id": 0, "image": ["1.png", "0.png"], "question": "Same?"}])
    assert job.run(config) == 0
    assert "1 answered, 0 errors, 0 answered before" in capsys.readouterr().out

  def test_rows_that_the_memory_does_not_hold(self, small, monkeypatch):
    """They alone are errors, before anything of their size runs."""
    write_rows(
      small.prompts,
      [{"id": n, "image": "0.png", "question": "?" * length} for n, length in enumerate((450, 9, 460, 5, 440))],
    )
    taken, prefill_rows = [], Capacity.prefill_rows

    def watched(self, num_slots, memory):
      count = prefill_rows(self, num_slots, memory)
      taken.append(memory(count).temporaries + 2 * memory(count).results)
      return count

    monkeypatch.setattr(Capacity, "prefill_rows", watched)
    expected = answers_of(small)
    monkeypatch.setattr(capacity, "free_memory", lambda mesh: sum(taken) // 2)
    rows = answers_of(small)
    assert [row["error"] is None for _, row in sorted(rows.items())] == [False, True] * 2 + [False]
    for number, row in rows.items():
      assert row == expected[number] if number % 2 else "a prompt of 510 tokens, padding included" in row["error"]

  def test_a_run_of_errors_alone(self, small, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert job.run(changed(small, image_dir=tmp_path / "empty")) == 1
    table = capsys.readouterr().out
    assert "0 answered, 4 errors" in table and "a: 0.png: No such file" in table

  def test_no_weights_are_read_where_nothing_is_left(self, small, monkeypatch, capsys):
    assert job.run(small) == 0
    monkeypatch.setattr(OpenCheckpoint, "restore", None)
    assert job.run(small) == 0
    assert "0 answered, 0 errors, 4 answered before" in capsys.readouterr().out

  def test_picture_names(self, config, tmp_path):
    ids = ["a/b", "a_b", "..", "x" * 300, "x" * 299 + "y", "é", "plain-1.0", 7]
    write_rows(config.prompts, [{"id": i, "image": "0.png", "question": "Why?"} for i in ids])
    assert job.run(changed(config, pictures=tmp_path / "pictures")) == 0
    names = [path.name for path in (tmp_path / "pictures").iterdir()]
    assert len(names) == len(ids)
    assert {"plain-1.0.png", "7.png", "a_b.png"} < set(names)


class TestReader:
  """Prompts of one word; its length is the bucket."""

  @staticmethod
  def prepare(prompt):
    if prompt.question == "bad":
      raise UserError("bad")
    return Bucket(1, 16, len(prompt.question)), Prepared(prompt, prompt.question, None, "")

  def make(self, questions):
    prompts = [Prompt(index, ("image",), question) for index, question in enumerate(questions)]
    reader = Reader(prompts, self.prepare, [Bucket(1, 16, length) for length in (1, 2, 3)])
    reader.num_rows |= {Bucket(1, 16, 1): 2, Bucket(1, 16, 2): 2}
    return reader

  def test_reads_until_a_bucket_fills_a_batch(self):
    reader = self.make(["a", "bb", "bad", "d", "ee", "f", "g", "ccc"])
    for _ in range(2):
      reader.read()
      assert reader.filled() == [1, 0.5, 0]
    assert [row.prompt.id for row in reader.take(Bucket(1, 16, 1))] == [0, 3]
    assert [(prompt.id, error) for prompt, error in reader.take_errors()] == [(2, "bad")]
    assert reader.take_errors() == []
    reader.read()
    assert reader.filled() == [0, 1, 0]
    assert [row.prompt.id for row in reader.take(Bucket(1, 16, 2))] == [1, 4]
    reader.read()
    assert [row.prompt.id for row in reader.take(Bucket(1, 16, 1))] == [5, 6]

  def test_reads_until_a_bucket_of_which_no_rows_are_known_has_one(self):
    reader = self.make(["a", "ccc", "ccc", "ccc"])
    reader.read()
    assert reader.filled() == [0.5, 0, 1]
    reader.num_rows[Bucket(1, 16, 3)] = 4
    reader.read()
    assert reader.filled() == [0.5, 0, 0.75]

  def test_what_is_left_comes_in_smaller_batches(self):
    reader = self.make(["a", "bb", "c", "d"])
    for expected in ([1, 0.5, 0], [0.5, 0.5, 0]):
      reader.read()
      assert reader.filled() == expected
      reader.take(Bucket(1, 16, 1))
    assert [row.example for row in reader.take(Bucket(1, 16, 2))] == ["bb"]
    reader.read()
    assert reader.filled() == [0, 0, 0] and reader.take(Bucket(1, 16, 1)) == []


def refuses(config, message):
  """A run that stops with a message of one line before it has written anything."""
  before = config.output.read_bytes() if os.path.isfile(config.output) else None
  with pytest.raises((UserError, CheckpointError)) as caught:
    job.run(config)
  assert message in str(caught.value)
  assert "\n" not in str(caught.value)
  after = config.output.read_bytes() if os.path.isfile(config.output) else None
  assert after == before


class TestBadConfiguration:
  @pytest.mark.parametrize(
    "changes, message",
    [
      (dict(keep=(N + 1, 3)), "cannot keep 17 image tokens before layer 2: there are 16"),
      (dict(keep=(4, 8)), "cannot keep 8 image tokens before layer 3: there are 4"),
      (dict(keep=(8, 0)), "cannot keep 0 image tokens"),
      (dict(keep=(8, -1)), "cannot keep -1 image tokens"),
      (dict(keep=(0.0, 0.0)), "must be above 0% and at most 100%"),
      (dict(keep=(1.5, 0.5)), "must be above 0% and at most 100%"),
      (dict(keep=(8,)), "has 2 stages, but keep has 1 values"),
      (dict(keep=(8, 4, 2)), "has 2 stages, but keep has 3 values"),
      (dict(prune_layers=(2,)), "has 2 stages, but prune_layers has 1 values"),
      (dict(prune_layers=(3, 2)), "pruning layers must ascend, but 2 follows 3"),
      (dict(prune_layers=(2, 2)), "pruning layers must ascend"),
      (dict(prune_layers=(0, 2)), "cannot prune before layer 0: it needs the attention"),
      (dict(prune_layers=(2, 6)), "cannot prune before layer 6: the model has layers 0 to 3"),
      (dict(prune_layers=(-1, 2)), "cannot prune before layer -1"),
      (dict(prune_layers=None), "cannot prune before layer 8"),
      (dict(method="none", prune_layers=None), "'none' has 0 stages, but keep has 2 values"),
      (dict(method="none", keep=None), "'none' has 0 stages, but prune_layers has 2 values"),
      (dict(parameters=(("threshold", 0.5),)), "threshold"),
      (dict(method="none", prune_layers=None, keep=None, restore=True), "method 'none' removes none"),
      (dict(prompt_template="{question}"), "a text with one <image>"),
      (dict(prompt_buckets=(64, 32)), "must be positive and ascending, not 64,32"),
      (dict(prompt_buckets=()), "must be positive and ascending"),
      (dict(max_new_tokens=500), "context of 512 tokens does not hold"),
      (dict(image_dir=pathlib.Path("/nowhere")), "--image_dir=/nowhere: no such directory"),
      (dict(prompts=pathlib.Path("/nowhere")), "cannot read the prompt file /nowhere"),
      (dict(prompts=pathlib.Path(os.devnull)), "cannot read the prompt file /dev/null: not a regular file"),
      (dict(output=pathlib.Path("/proc/nowhere/output.jsonl")), "--output: cannot create the directory"),
      (dict(output=pathlib.Path("/dev/full")), "not a regular file"),
      (dict(output=pathlib.Path("x.csv")), "--output=x.csv: the output is JSONL, or parquet if its name ends with"),
      (dict(output=pathlib.Path("x" * 300)), "File name too long"),
      (dict(pictures=pathlib.Path("/proc/nowhere")), "--pictures: cannot create the directory"),
    ],
  )
  def test_stops_before_writing(self, config, changes, message):
    refuses(changed(config, **changes), message)

  def test_output_over_prompts(self, config, tmp_path):
    refuses(changed(config, output=config.prompts), "--output is the same file as --prompts")
    (tmp_path / "link").symlink_to(config.prompts)
    refuses(changed(config, output=tmp_path / "link"), "--output is the same file as --prompts")

  def test_output_that_something_else_wrote(self, config):
    config.output.write_text("notes\n")
    refuses(config, "line 1 is not an output row")

  def test_output_that_was_there_stays(self, config):
    config.output.touch()
    refuses(changed(config, keep=(0, 0)), "cannot keep 0")
    assert config.output.exists()

  def test_pictures_of_tokens_that_are_no_grid(self, config, loaded, tmp_path):
    config = changed(config, checkpoint=str(loaded("clip_gqa_tied").directory), pictures=tmp_path / "pictures")
    refuses(config, "this model's 17 image tokens do not form its grid of 4 x 4 patches")

  def test_checkpoints(self, config, checkpoints, tmp_path, monkeypatch, cache):
    monkeypatch.setenv("HIMAP_JAX_CACHE", str(cache))
    refuses(changed(config, checkpoint="/nowhere"), "neither a directory nor a Hugging Face id")
    for name, spoil, message in (
      ("missing", lambda path: split(path)[1].unlink(), "1 of 2 shards are missing"),
      ("truncated", lambda path: os.truncate(split(path)[1], 5000), "truncated"),
      ("shapes", narrow, "multi_modal_projector"),
      ("type", lambda path: edit(path, model_type="paligemma"), "model_type is 'paligemma'"),
      ("text", lambda path: edit(path, text_config={"model_type": "mamba"}), "language model 'mamba'"),
      ("config", lambda path: (path / "config.json").write_text("{"), "cannot be read"),
      ("nothing", lambda path: (path / "config.json").unlink(), "cannot be read"),
      ("token", lambda path: edit(path, image_token_index=7), "tokenizer and config.json disagree"),
      ("pickled", lambda path: (path / "model.safetensors").rename(path / "model.bin"), "only pickled weights"),
    ):
      path = shutil.copytree(checkpoints(NAME).directory, tmp_path / name)
      spoil(path)
      refuses(changed(config, checkpoint=str(path)), message)


def split(path):
  """Splits the weights into two shards; returns their paths."""
  tensors = load_file(path / "model.safetensors")
  (path / "model.safetensors").unlink()
  names = sorted(tensors)
  shards = [path / f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
  parts = [names[::2], names[1::2]]
  for shard, part in zip(shards, parts, strict=True):
    save_file({name: tensors[name] for name in part}, shard)
  weight_map = {name: shard.name for shard, part in zip(shards, parts, strict=True) for name in part}
  (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
  return shards


def narrow(path):
  tensors = load_file(path / "model.safetensors")
  (name,) = (name for name in tensors if name.endswith("multi_modal_projector.linear_1.weight"))
  save_file(tensors | {name: tensors[name][:-1].copy()}, path / "model.safetensors")


def edit(path, **fields):
  config = json.loads((path / "config.json").read_text())
  (path / "config.json").write_text(json.dumps(config | fields))


@contextlib.contextmanager
def parsed(*arguments):
  with flagsaver.flagsaver():
    flags.FLAGS(["run", *arguments])
    yield


NEEDED = ("--prompts=p", "--output=o")


class TestFlags:
  def test_defaults(self):
    with parsed(*NEEDED):
      config = config_from_flags()
    assert config.pruning == himap_jax.PruningConfig("himap", None, None, ())
    assert (config.checkpoint, config.dtype, config.generation.sampling) == ("demo", "bfloat16", Sampling())
    assert config.resume and not config.strict and config.compilation_cache_dir.endswith("/compiled")
    assert hash(config) == hash(config)

  def test_values(self):
    with parsed(*NEEDED, "--keep=50%, 12.5%", "--prune_layers=2,8", "--emit=kept,tokens", "--prompt_buckets=8,16",
                    "--temperature=0.5", "--top_p=0.9", "--compilation_cache_dir=", "--noresume",
                    "--method_parameters=threshold:0.7", "--restore"):  # fmt: skip
      config = config_from_flags()
    assert (config.pruning.keep, config.pruning.prune_layers) == ((0.5, 0.125), (2, 8))
    assert (config.pruning.parameters, config.inputs.prompt_buckets) == ((("threshold", 0.7),), (8, 16))
    assert (config.emit, config.generation.sampling) == (frozenset({"kept", "tokens"}), Sampling(0.5, 0.9))
    assert (config.compilation_cache_dir, config.resume) == ("", False)
    assert config.pruning.restore and config.pruning.label == "himap+restore"

  def test_columns(self):
    with parsed(*NEEDED, "--columns=image:img, question:q,id:qid", "--split=A/test"):
      config = config_from_flags()
    assert config.columns == Columns(("qid",), ("img",), ("q",), ("messages",)) and config.split == "A/test"

  def test_a_schedule_from_a_file(self, tmp_path):
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps({"method": "himap", "prune_layers": [3, 9], "keep": [200, 50], "lost": 0.1}))
    with parsed(*NEEDED, f"--schedule={path}"):
      config = config_from_flags()
    assert config.pruning == himap_jax.PruningConfig("himap", (3, 9), (200, 50))
    with (
      parsed(*NEEDED, f"--schedule={path}", "--keep=5,3"),
      pytest.raises(UserError, match="takes the place of --keep"),
    ):
      config_from_flags()
    huge = {"method": "himap", "prune_layers": [3, 9], "keep": [float("inf"), 50]}
    for fields in ({"method": "himap", "keep": [200, 50]}, huge, huge | {"method": None, "keep": [200, 50]}):
      path.write_text(json.dumps(fields))
      with (
        parsed(*NEEDED, f"--schedule={path}"),
        pytest.raises(UserError, match="not an object with method, prune_layers"),
      ):
        config_from_flags()

  @pytest.mark.parametrize("name, devices", [("cloud_tpu_v5e_8", 8), ("cloud_tpu_v5e_16", 16)])
  def test_flagfiles_of_slices(self, name, devices, monkeypatch):
    monkeypatch.chdir(ROOT)
    with parsed(f"--flagfile=experiments/flags/{name}.flags"):
      config, is_distributed = config_from_flags(), flags.FLAGS.distributed
    assert config.pruning == himap_jax.PruningConfig("himap", (2, 8), (288, 72))
    assert config.mesh["data"] * config.mesh["tensor"] == devices
    assert config.inputs.batch_size is None  # the memory of the slice says
    assert config.checkpoint.startswith("gs://") and is_distributed == (devices > 8)

  @pytest.mark.parametrize(
    "name, checkpoint, template, kept, is_pickled",
    [
      ("llava_7b", "liuhaotian/llava-v1.5-7b", "vicuna_v1", (288, 72), True),
      ("internvl_7b", "OpenGVLab/InternVL-Chat-ViT-6B-Vicuna-7B", "vicuna_v1", (288, 72), True),
      ("qwen_vl_7b", "Qwen/Qwen-VL-Chat", "chat", (128, 32), True),
      ("qwen2_vl", "Qwen/Qwen2-VL-2B-Instruct", "chat", (128, 32), False),
      ("qwen2_5_vl", "Qwen/Qwen2.5-VL-3B-Instruct", "chat", (128, 32), False),
      ("qwen3_vl", "Qwen/Qwen3-VL-2B-Instruct", "chat", (128, 32), False),
      ("gemma3_4b", "google/gemma-3-4b-it", "chat", (128, 32), False),
    ],
  )
  def test_flagfiles_of_models(self, name, checkpoint, template, kept, is_pickled, monkeypatch):
    monkeypatch.chdir(ROOT)
    with parsed(f"--flagfile=experiments/flags/{name}.flags"):
      config = config_from_flags()
    assert (config.checkpoint, config.inputs.prompt_template) == (checkpoint, template)
    assert config.allow_pickle == is_pickled
    stages = config.pruning.schedule(32, kept[0] * 2).stages
    assert [(stage.layer, stage.keep) for stage in stages] == [(2, kept[0]), (8, kept[1])]

  def test_flagfile_of_llama_3_2_vision(self, monkeypatch):
    from experiments.shared import geometries
    from himap_jax.engine.accounting import method_inputs

    monkeypatch.chdir(ROOT)
    with parsed("--flagfile=experiments/flags/mllama_11b.flags"):
      config = config_from_flags()
    model = geometries.model_of("mllama_11b")
    stages = config.pruning.schedule(num_image_tokens=model.num_image_tokens(560, 560), **method_inputs(model)).stages
    assert [(stage.layer, stage.keep) for stage in stages] == [(4, 3202), (9, 800)]

  @pytest.mark.parametrize(
    "arguments, message",
    [
      (("--output=o",), "--prompts is required"),
      (("--prompts=p",), "--output is required"),
      ((*NEEDED, "--batch_size=0"), "--batch_size must be at least 1, but is 0"),
      ((*NEEDED, "--max_new_tokens=0"), "--max_new_tokens must be at least 1"),
      (
        (*NEEDED, "--emit=tokens,thoughts"),
        "--emit: unknown thoughts; known: tokens, kept, patches, counts, logits, timing",
      ),
      ((*NEEDED, "--method=fasttv"), "unknown method 'fasttv'; known: cdpruner, dart, divprune, fastervlm,"),
      ((*NEEDED, "--method=divprune+fasttv"), "unknown method 'fasttv'"),
      ((*NEEDED, "--method_parameters=0.7"), "--method_parameters=0.7: not a list such as threshold:0.8"),
      ((*NEEDED, "--method_parameters=threshold:high"), "--method_parameters=threshold:high: not a list"),
      ((*NEEDED, "--keep=half,2"), "--keep=half,2: not a list of numbers"),
      ((*NEEDED, "--keep=1.5,2"), "--keep=1.5,2: not a list of numbers"),
      ((*NEEDED, "--prune_layers=2;8"), "not a list of numbers"),
      ((*NEEDED, "--prompt_buckets=a"), "--prompt_buckets=a: not a list of numbers"),
      (("--prompts=p", "--output=gs://b/o"), "--output=gs://b/o: only --checkpoint may be a URL; mount the bucket"),
      ((*NEEDED, "--image_dir=gs://b/i"), "--image_dir=gs://b/i: only --checkpoint may be a URL"),
      ((*NEEDED, "--columns=img:image"), "--columns: unknown field 'img' in 'img:image'; known: id, image, question"),
      ((*NEEDED, "--top_p=0.5"), "top_p below 1 needs a temperature above 0"),
      ((*NEEDED, "--temperature=nan"), "temperature must be 0, or finite"),
    ],
  )
  def test_contradictions(self, arguments, message):
    with parsed(*arguments), pytest.raises(UserError) as caught:
      config_from_flags()
    assert message in str(caught.value)

  @pytest.mark.parametrize("argument", ["--dtype=int8", "--batch_size=two", "--no_such_flag"])
  def test_values_that_absl_refuses(self, argument):
    with pytest.raises(flags.Error), parsed(*NEEDED, argument):
      pass

  @pytest.mark.parametrize(
    "arguments, stray, message",
    [
      (("--prompts=/nowhere", "--output=o"), (), "himap_jax: cannot read the prompt file /nowhere"),
      ((), ("false",), "himap_jax: unexpected argument 'false'"),
    ],
  )
  def test_one_line_and_status_2(self, arguments, stray, message, capsys):
    with parsed(*arguments), pytest.raises(SystemExit) as caught:
      command.main(["run", *stray])
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert (output.out, output.err.count("\n")) == ("", 1)
    assert output.err.startswith(message)


def start(*arguments, cache):
  return commands.Command("himap_jax.run", *arguments, HIMAP_JAX_CACHE=str(cache), COLUMNS="200")


def wait_for_lines(command, path, count):
  command.wait_until(lambda: path.exists() and path.read_bytes().count(b"\n") >= count)


class TestProcesses:
  def test_help(self):
    text = commands.Command("himap_jax.run", "--help").succeeded()
    assert (
      text.index("Needed:\n  --prompts: ") < text.index("  --output: ") < text.index("Checkpoint:\n  --checkpoint: ")
    )
    assert "python -m himap_jax.run" in text
    for name in FLAGS:
      assert f"  --{name}: " in text

  def test_interrupted_while_it_imports(self, monkeypatch, tmp_path):
    """Without a word, while a library takes its time."""
    (tmp_path / "jax.py").write_text("import time\nprint(flush=True)\ntime.sleep(100)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    command = ["env", "--default-signal=INT", sys.executable, "-m", "himap_jax.run"]  # the tests may ignore it
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
      process.stdout.readline()
      process.send_signal(signal.SIGINT)
      assert process.communicate() == (b"", b"")
    assert process.returncode == -signal.SIGINT

  def test_interrupted_killed_and_started_again(self, config, checkpoints, cache, tmp_path):
    """One row a batch, from a flagfile, on a checkpoint that the first process converts."""
    rows = [{"id": i, "image": f"{i % 4}.png", "question": f"Is {i} one?"} for i in range(120)]
    write_rows(config.prompts, rows)
    values = {
            "checkpoint": checkpoints(NAME).directory, "prompts": config.prompts, "image_dir": tmp_path,
            "output": config.output, "prune_layers": "2,3", "keep": "50%,3", "max_new_tokens": 30, "batch_size": 1,
            "prompt_buckets": "40,60", "prompt_template": "vicuna\\n<image>{question}", "dtype": "float32",
            "emit": "tokens,kept", "ignore_eos": "true",
        }  # fmt: skip
    flagfile = tmp_path / "run.flags"
    flagfile.write_text("# a comment\n" + "".join(f"--{name}={value}\n" for name, value in values.items()))
    arguments = (f"--flagfile={flagfile}",)

    interrupted = start(*arguments, cache=cache)
    wait_for_lines(interrupted, config.output, 2)
    interrupted.interrupt()
    _, errors = interrupted.communicate()
    assert interrupted.process.exitcode == 130
    assert errors.strip().endswith("himap_jax: interrupted; the same command continues from here")
    assert "Traceback" not in errors
    done = config.output.read_text()
    assert done.endswith("\n")
    assert 1 <= done.count("\n") < 120  # the interrupt takes back a row that is not yet on the disk

    killed = start(*arguments, cache=cache)
    wait_for_lines(killed, config.output, done.count("\n") + 2)
    killed.process.kill()
    killed.communicate()
    done = config.output.read_text()
    assert done.count("\n") < 120
    config.output.write_text(done + '{"id": 119, "answer": "to')

    replacing = start(*arguments, "--noresume", "--keep=7,2", "--verbosity=0", cache=cache)
    replacing.wait_until(lambda: "ready: weights" in replacing.text()[1])
    replacing.process.kill()  # before its first batch
    replacing.communicate()
    assert config.output.read_text() == done + '{"id": 119, "answer": "to'

    last = start(*arguments, "--strict", cache=cache)
    table = last.succeeded()
    assert f"{120 - done.count(chr(10))} answered, 0 errors, {done.count(chr(10))} answered before" in table
    assert config.output.read_text().startswith(done)
    answers = read(config.output)
    assert sorted(answers) == list(range(120))
    for row in answers.values():
      assert len(row["token_ids"]) == 30
      assert [len(stage) for stage in row["kept"]] == [8, 3]
