"""Whole runs on tables: the answers of the same prompts in lines, kept, resumed and refused as these are."""

import json
import time
from unittest import mock

import pyarrow as pa
import pytest
import running
from pyarrow import parquet
from running import changed, read
from tiny_checkpoints import noise_image

from himap_jax import UserError
from himap_jax.engine.engine import Engine
from himap_jax.families.family import Processor
from himap_jax.inputs import ImageSize
from himap_jax.run import job
from himap_jax.run.picture_sizes import image_sizes
from himap_jax.run.pictures import PictureFiles
from himap_jax.run.prompts import Columns, Prompt, Prompts


@pytest.fixture
def table(small):
  """The job on a table of its prompts, twice, that holds their pictures; and what it is made of."""
  lines = list(map(json.loads, small.prompts.read_text().splitlines()))
  rows = [
    {
      "qid": f"{row['id']}-{turn}",
      "img": {"bytes": (small.image_dir / row["image"]).read_bytes(), "path": None},
      "q": row["question"],
    }
    for turn in range(2)
    for row in lines
  ]
  config = changed(
    small,
    prompts=small.prompts.with_name("table.parquet"),
    output=small.output.with_name("output.parquet"),
    columns=Columns(("qid",), ("img",), ("q",)),
    image_dir=small.image_dir / "none",
  )
  config.image_dir.mkdir()
  write(config, rows)
  return config, rows


def write(config, rows):
  picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
  schema = pa.schema([("qid", pa.string()), ("img", picture), ("q", pa.string())])
  parquet.write_table(pa.Table.from_pylist(rows, schema), config.prompts, row_group_size=3)


def read_table(config):
  assert not config.output.with_name("output.parquet.jsonl").exists()
  return {row["id"]: row for row in parquet.read_table(config.output).to_pylist()}


def test_a_table_is_answered_as_its_lines(small, table, capsys, monkeypatch):
  config, rows = table
  assert job.run(small) == 0
  expected = {str(row_id): row for row_id, row in read(small.output).items()}
  rows.append({"qid": "bad", "img": {"bytes": b"no picture", "path": None}, "q": "?"})
  write(config, rows)
  assert job.run(config) == 0
  found = read_table(config)
  assert found.pop("bad")["error"].startswith("the picture of 10 bytes in the row: not an image of a supported format")
  assert found.keys() == {row["qid"] for row in rows[:-1]}
  for row_id, row in found.items():
    as_line = expected[row_id.split("-")[0]]
    assert row | {"digest": row["digest"][:50]} == as_line | {"id": row_id, "digest": as_line["digest"][:50]}

  capsys.readouterr()
  loads, load = [], PictureFiles.load
  monkeypatch.setattr(PictureFiles, "load", lambda self, image: loads.append(image) or load(self, image))
  rows[2]["img"], rows[-1]["img"] = rows[0]["img"], None
  write(config, rows)
  assert job.run(config) == 0
  assert loads == [rows[0]["img"]["bytes"]] and "2 answered, 0 errors, 7 answered before" in capsys.readouterr().out
  again = read_table(config)
  assert again["bad"]["error"] is None and again["3-0"]["digest"] != found["3-0"]["digest"]
  assert {row_id for row_id in found if found[row_id] != again[row_id]} == {"3-0"}

  before = config.output.read_bytes()
  with pytest.raises(
    UserError, match="output.parquet: made with other settings .keep was .8, 3., now .7, 2.*--noresume"
  ):
    job.run(changed(config, keep=(7, 2)))
  assert config.output.read_bytes() == before and read_table(config) == again


def test_interrupted_between_turns(table, capsys, monkeypatch):
  config, rows = table
  answer = Engine.answer

  def interrupted(*arguments):
    count = 0
    for turn in answer(*arguments):
      yield turn
      count += len(turn)
      if count > 2:
        raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(Engine, "answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
      job.run(config)
  first = running.read(config.output.with_name("output.parquet.jsonl"))
  assert 2 < len(first) < 8 and not config.output.exists()
  assert job.run(config) == 0
  assert f"{8 - len(first)} answered, 0 errors, {len(first)} answered before" in capsys.readouterr().out
  assert read_table(config).keys() == {row["qid"] for row in rows}
  assert first.items() <= read_table(config).items()


def test_an_interrupt_waits_for_one_prompt_at_most(small, monkeypatch):
  rows = [{"id": n, "image": "0.png" if n < 4 else "none.png", "question": "Why?"} for n in range(200)]
  running.write_rows(small.prompts, rows)
  loaded, load = [], PictureFiles.load

  def slow(self, image):
    time.sleep(0.01 * (image == "none.png"))
    loaded.append(image)
    return load(self, image)

  def interrupted(_, batches):
    yield from ()
    next(batches)
    raise KeyboardInterrupt

  monkeypatch.setattr(PictureFiles, "load", slow)
  monkeypatch.setattr(Engine, "answer", interrupted)
  with pytest.raises(KeyboardInterrupt):
    job.run(small)
  assert len(loaded) < 100


def test_sizes_of_pictures_in_rows(table):
  config, rows = table

  def image_size(sizes):
    return ImageSize(len(sizes), sum(width * height for width, height in sizes))

  processor = mock.Mock(spec=Processor, num_image_tokens=None, image_size=image_size)
  data = rows[0]["img"]["bytes"]
  noise_image((7, 5), 0).save(config.image_dir / "a.png")
  prompts = [
    Prompt(0, (data,)),
    Prompt(1, (data, "a.png")),
    Prompt(2),
    Prompt(3, ("none.png",)),
    Prompt(4, error="bad"),
  ]
  prompts.append(Prompt(5, (data,)))
  sizes = image_sizes(Prompts.of(prompts), PictureFiles(config.image_dir), processor)
  assert sizes == {ImageSize(1, 1600): 2, ImageSize(2, 1635): 1, ImageSize(0, 0): 1}


def test_outputs_among_prompts(table, tmp_path):
  config, rows = table
  directory = tmp_path / "set"
  directory.mkdir()
  config.prompts.rename(directory / "test.parquet")
  config = changed(config, prompts=directory)
  for name in ("output.parquet", "deep/output.jsonl"):
    with pytest.raises(UserError, match=f"--output=.*{name} is in the data set .*set"):
      job.run(changed(config, output=directory / name))
  for flag in ("pictures", "profile_dir"):
    with pytest.raises(UserError, match=f"--{flag}=.*drawn is in the data set .*set"):
      job.run(changed(config, **{flag: directory / "drawn"}))
  with pytest.raises(UserError, match="which a run with this --output writes"):
    job.run(changed(config, prompts=directory / "test.parquet", output=directory / "test.parquet"))
  assert [path.name for path in directory.iterdir()] == ["test.parquet"]
  assert len(job.read_prompts(job.open_records(directory), config.columns)) == len(rows)
