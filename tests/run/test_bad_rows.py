"""Rows that cannot be answered: each is reported in its own output row, and the others go on."""

import json
import shutil

import numpy as np
import pytest
import running
import tiny_checkpoints
from PIL import Image
from running import changed, read, write_rows

import himap_jax
from himap_jax.checkpoint import OpenCheckpoint
from himap_jax.engine import capacity
from himap_jax.engine.capacity import Capacity
from himap_jax.errors import UserError
from himap_jax.run import answering, drawing, job, reader
from himap_jax.run.output import Output
from himap_jax.run.pictures import load_image

NAME = running.NAME
MAX_NEW, PRUNE_LAYERS = running.MAX_NEW, running.PRUNE_LAYERS


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

  def test_each_is_its_row_s_error(self, bad, tmp_path, capsys):
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
    capsys.readouterr()
    assert job.run(changed(config, pictures=tmp_path / "others", emit=frozenset({"tokens"}))) == 0
    assert f"{len(good)} answered rows have no picture in {tmp_path / 'others'} and get none" in capsys.readouterr().err
    assert job.run(changed(config, pictures=pictures, emit=frozenset({"tokens"}))) == 0
    assert "have no picture" not in capsys.readouterr().err
    drawing.save(Image.new("1", (15_000, 12_000)), pictures / "several.png", "other-settings")  # of many pictures
    assert job.run(changed(config, pictures=pictures, emit=frozenset({"tokens"}))) == 0
    assert f"1 answered rows have no picture in {pictures}" in capsys.readouterr().err

    with (tmp_path / "prompts.jsonl").open("ab") as file:
      file.write(b'{"id": "late", "image": "0.png", "question": "<image><image>"}\n')
    load_image(tmp_path / "0.png").save(tmp_path / "missing.png")
    assert rows["image missing.png"]["error"]
    assert job.run(changed(config, emit=frozenset({"tokens"}), strict=True)) == 1
    again = read(config.output)
    assert again.keys() == rows.keys() | {"late"}
    assert again.pop("late")["error"] and again.pop("image missing.png")["error"] is None
    assert all(again[row_id] == rows[row_id] for row_id in again)

  @pytest.mark.sampled(of="runs")
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
    expected = running.answers_of(small)
    monkeypatch.setattr(capacity, "free_memory", lambda mesh: sum(taken) // 2)
    rows = running.answers_of(small)
    assert [row["error"] is None for _, row in sorted(rows.items())] == [False, True] * 2 + [False]
    for number, row in rows.items():
      assert row == expected[number] if number % 2 else "a prompt of 510 tokens, padding included" in row["error"]

  def test_a_run_of_errors_alone(self, small, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert job.run(changed(small, image_dir=tmp_path / "empty")) == 1
    table = capsys.readouterr().out
    assert "0 answered, 4 errors" in table and "a: 0.png: No such file" in table

  def test_a_run_without_pictures(self, small, capsys):
    write_rows(small.prompts, [{"id": "a", "question": "Why?"}])
    assert job.run(small) == 0
    table = capsys.readouterr().out
    assert "1 answered, 0 errors" in table and "FLOPs on all tokens" in table and "on image tokens" not in table

  def test_errors_are_written_before_the_end(self, small, capsys, monkeypatch):
    """No batch fills before it, and a part of one waits."""
    lines = [{"id": n, "image": "0.png" if n in (2, 9) else "none.png", "question": "Why?"} for n in range(10)]
    write_rows(small.prompts, lines)
    expected = running.answers_of(small)
    sizes, written = [], Output.write
    for module in (answering, reader):
      monkeypatch.setattr(module, "MAX_WAITING_ERRORS", 3)
    monkeypatch.setattr(Output, "write", lambda self, rows: (sizes.append(len(rows)), written(self, rows)))
    assert running.answers_of(small) == expected
    assert sum(sizes) == 10 and sizes[:2] == [3, 3]
    assert "2 answered, 8 errors" in capsys.readouterr().out

  def test_no_weights_are_read_where_nothing_is_left(self, small, monkeypatch, capsys):
    assert job.run(small) == 0
    monkeypatch.setattr(OpenCheckpoint, "restore", None)
    assert job.run(small) == 0
    assert "0 answered, 0 errors, 4 answered before" in capsys.readouterr().out

  def test_a_picture_of_others_is_never_replaced(self, config, tmp_path):
    """As in a directory below --image_dir."""
    write_rows(config.prompts, [{"id": number, "image": f"{number}.png", "question": "Why?"} for number in range(2)])
    (tmp_path / "sources").mkdir()
    own = shutil.copy(tmp_path / "1.png", tmp_path / "sources/1.png")
    before = own.read_bytes()
    with pytest.raises(UserError, match="sources/1.png is no picture of an earlier run; name another directory"):
      job.run(changed(config, pictures=tmp_path / "sources"))
    assert own.read_bytes() == before
    own.unlink()
    assert job.run(changed(config, pictures=tmp_path / "sources")) == 0
    assert job.run(changed(config, pictures=tmp_path / "sources", resume=False, max_new_tokens=3)) == 0
    assert sorted(path.name for path in (tmp_path / "sources").iterdir()) == ["0.png", "1.png"]

  def test_picture_names(self, config, tmp_path):
    ids = ["a/b", "a_b", "..", "x" * 300, "x" * 299 + "y", "é", "plain-1.0", 7]
    write_rows(config.prompts, [{"id": i, "image": "0.png", "question": "Why?"} for i in ids])
    assert job.run(changed(config, pictures=tmp_path / "pictures")) == 0
    names = [path.name for path in (tmp_path / "pictures").iterdir()]
    assert len(names) == len(ids)
    assert {"plain-1.0.png", "7.png", "a_b.png"} < set(names)
