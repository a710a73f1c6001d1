"""Rows of tables and directories: the same prompts whatever they are kept in, and one clear line where they are not."""

import base64
import io
import json
import logging
import os
import pathlib
import subprocess
import sys

import datasets
import local_hub
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from himap_jax import UserError
from himap_jax.families.family import Message
from himap_jax.run import prompts, records
from himap_jax.run.pictures import PictureFiles
from himap_jax.run.prompts import Columns, Prompt

ROOT = pathlib.Path(__file__).parents[2]
COLUMNS = ["id:qid", "image:img", "question:q"]
EMBEDDED = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(number):
  file = io.BytesIO()
  Image.new("RGB", (5 + number, 5), (number, 0, 0)).save(file, "PNG")
  return file.getvalue()


def rows(numbers):
  return [{"qid": n, "img": {"bytes": png(n), "path": f"{n}.png"}, "q": f"What is {n}?", "more": 1.5} for n in numbers]


def expected(numbers):
  return [Prompt(n, (png(n),), f"What is {n}?") for n in numbers]


def write_parquet(path, own, *, group=2, image=EMBEDDED, **types):
  types = {"qid": pa.int64(), "img": image, "q": pa.string(), "more": pa.float64()} | types
  path.parent.mkdir(parents=True, exist_ok=True)
  parquet.write_table(pa.Table.from_pylist(own, pa.schema(list(types.items()))), path, row_group_size=group)
  return path


def read(path, split=None, columns=COLUMNS):
  return prompts.read_prompts(records.open_records(path, split), Columns.parse(columns))


class TestLayouts:
  def test_a_file(self, tmp_path):
    path = write_parquet(tmp_path / "a.parquet", rows(range(5)))
    assert list(read(path)) == expected(range(5))
    assert read(path).keys == list("01234")

  def test_where(self, tmp_path):
    found = read(write_parquet(tmp_path / "a.parquet", rows(range(40)), group=7))
    for seed in range(4):
      wanted = np.random.default_rng(seed).random(40) < 0.3
      assert list(found.where(wanted)) == expected(np.flatnonzero(wanted).tolist())
    assert list(found.where(np.zeros(40, bool))) == []

  def test_a_hub_s_directory(self, tmp_path):
    for number, name in enumerate(("test-00000-of-00002", "test-00001-of-00002", "validation-00000-of-00001")):
      write_parquet(tmp_path / "data" / f"{name}.parquet", rows(range(3 * number, 3 * number + 3)))
    assert list(read(tmp_path, "test")) == expected(range(6))
    assert list(read(tmp_path, "validation")) == expected(range(6, 9))
    found = read(tmp_path, "test")
    assert list(found.where(np.arange(6) % 3 == 2)) == expected([2, 5])

  def test_configurations(self, tmp_path):
    names = ("A", "B")
    card = "".join(
      f"- config_name: {n}\n  data_files:\n  - split: test\n    path: {n.lower()}/*.parquet\n" for n in names
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{card}---\n")
    for number, name in enumerate("ab"):
      write_parquet(tmp_path / name / "x.parquet", rows([number]))
    assert list(read(tmp_path, "B/test")) == expected([1])
    for split in (None, "test", "C/test"):
      with pytest.raises(UserError, match="has the configurations A, B; choose one .* such as --split=A/test"):
        read(tmp_path, split)

  def test_of_the_hub_only_the_split_is_downloaded(self, tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text(
      "---\nconfigs:\n- config_name: A\n  data_files:\n  - split: test\n    path: a/test-*\n  - split: train\n    "
      "path: a/train-*\n- config_name: B\n  data_files:\n  - split: test\n    path: b/*\n---\n"
    )
    for number, name in enumerate(("a/test-0", "a/test-1", "a/train-0", "b/x")):
      write_parquet(tmp_path / f"{name}.parquet", rows([number]))
    asked = local_hub.serve(monkeypatch, tmp_path)
    assert list(read(pathlib.Path("own/er"), "A/test")) == expected([0, 1])
    names = ["README.md", "a/test-0.parquet", "a/test-1.parquet"]
    assert asked == [("own/er", "dataset"), *(("own/er", name, "dataset") for name in names)]
    with pytest.raises(UserError, match="own/er has the configurations A, B; choose one"):
      read(pathlib.Path("own/er"))

  def test_what_datasets_saved_on_the_hub(self, tmp_path, monkeypatch):
    types = {"qid": datasets.Value("int64"), "img": datasets.Image(), "q": datasets.Value("string")}
    own = [{name: row[name] for name in types} for row in rows(range(3))]
    datasets.Dataset.from_list(own, features=datasets.Features(types)).save_to_disk(tmp_path)
    local_hub.serve(monkeypatch, tmp_path)
    assert list(read(pathlib.Path("own/er"))) == expected(range(3))

  def test_of_the_hub_no_name_leads_outside(self, tmp_path, monkeypatch):
    local_hub.serve(monkeypatch, tmp_path)
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda *_, **__: ["a.parquet", "../b.parquet"])
    with pytest.raises(UserError, match=r"names a file outside of itself: '\.\./b\.parquet'"):
      read(pathlib.Path("own/er"))

  def test_of_an_unreachable_hub_what_was_downloaded_earlier(self, tmp_path, monkeypatch):
    write_parquet(tmp_path / "test.parquet", rows([4]))
    local_hub.serve(monkeypatch, tmp_path)

    def fail(*arguments, **settings):
      raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.list_repo_files", fail)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *arguments, **settings: str(tmp_path))
    assert list(read(pathlib.Path("own/er"))) == expected([4])
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError, match="own/er: no such file or directory, and it cannot be .* .no route to host"):
      read(pathlib.Path("own/er"))

  def test_files_that_their_names_count_are_all_there(self, tmp_path, monkeypatch):
    """Of the hub, too, where those that were downloaded earlier are listed; one that a card names alone is enough."""
    for number in (0, 2):
      write_parquet(tmp_path / "data" / f"test-{number:05}-of-00003-{'ab'[number // 2]}.parquet", rows([number]))
    write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", rows([9]))
    local_hub.serve(monkeypatch, tmp_path)
    for path in (tmp_path, pathlib.Path("own/er")):
      with pytest.raises(UserError, match=f"{path} has only 2 of the 3 files test-\\*-of-00003; download the others"):
        read(path, "test")
      assert list(read(path, "train")) == expected([9])
    write_parquet(tmp_path / "data" / "test-00001-of-00003-c.parquet", rows([1]))
    assert list(read(tmp_path, "test")) == expected(range(3))
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: A\n  data_files: data/test-00001-*\n---\n")
    assert list(read(tmp_path)) == expected([1])

  def test_an_unreachable_hub_is_asked_once_and_quietly(self, monkeypatch, capfd):
    def fail(*arguments, **settings):
      logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
      raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.dataset_info", fail)
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda *_, **__: pytest.fail("it retries"))
    with pytest.raises(UserError, match="own/er: no such file or directory, and it cannot be .* .no route to host"):
      read(pathlib.Path("own/er"))
    assert capfd.readouterr().err == ""

  def test_an_unreachable_hub_in_a_process_of_its_own(self):
    code = "import pathlib\nfrom himap_jax.run import records\nrecords.open_records(pathlib.Path('nobody/nothing'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("himap_jax.errors.UserError: nobody/nothing: no such file or directory, and it cannot be do")

  def test_what_is_missing_in_a_directory_is_not_asked_of_the_hub(self, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    for split in (None, "test"):
      with pytest.raises(UserError, match="cannot read the prompt file own/er: No such file or directory"):
        read(pathlib.Path("own/er"), split)

  def test_what_datasets_saved(self, tmp_path):
    types = {"qid": datasets.Value("int64"), "img": datasets.Image(), "q": datasets.Value("string")}
    own = [{name: row[name] for name in types} for row in rows(range(40))]
    saved = datasets.Dataset.from_list(own, features=datasets.Features(types))
    saved.save_to_disk(tmp_path / "one")
    assert list(read(tmp_path / "one")) == expected(range(40))
    saved.select([]).save_to_disk(tmp_path / "none")
    with pytest.raises(UserError, match="none is no data set with rows"):
      read(tmp_path / "none")
    (tmp_path / "one" / "cache-0123.arrow").write_bytes(b"left by datasets.map")
    wanted = np.arange(40) % 19 == 3
    assert list(read(tmp_path / "one").where(wanted)) == expected([3, 22])
    datasets.DatasetDict({"train": saved, "test": saved.select([7, 2])}).save_to_disk(tmp_path / "two")
    assert list(read(tmp_path / "two", "test")) == expected([7, 2])
    with pytest.raises(UserError, match="two has the splits train, test; choose one with --split"):
      read(tmp_path / "two")

  def test_suffixes_in_capitals(self, tmp_path):
    (tmp_path / "a.CSV").write_text("qid,img,q\n1,a.png,Why?\n")
    assert list(read(tmp_path / "a.CSV")) == [Prompt("1", ("a.png",), "Why?")]
    assert list(read(write_parquet(tmp_path / "a.Parquet", rows([1])))) == expected([1])

  @pytest.mark.parametrize("suffix", ["csv", "jsonl"])
  def test_text(self, tmp_path, suffix):
    text = {"csv": "qid,img,q\n1,a.png,Why?\n2,,Who?\n", "jsonl": '{"qid": "1", "img": "a.png", "q": "Why?"}\n'}
    for path in (tmp_path / f"a.{suffix}", tmp_path / "own" / f"test.{suffix}"):
      path.parent.mkdir(exist_ok=True)
      path.write_text(text[suffix])
    first = [Prompt("1", ("a.png",), "Why?"), Prompt("2", (), "Who?")][: 2 if suffix == "csv" else 1]
    assert list(read(tmp_path / f"a.{suffix}")) == list(read(tmp_path / "own")) == first

  def test_a_conversation(self, tmp_path):
    part = pa.struct([("type", pa.string()), ("text", pa.string()), ("image", EMBEDDED)])
    messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(part))]))
    content = [{"type": "image", "image": {"bytes": png(1), "path": None}}, {"type": "text", "text": "What?"}]
    own = [{"qid": 1, "messages": [{"role": "user", "content": content}]}]
    path = write_parquet(tmp_path / "a.parquet", own, messages=messages)
    assert list(read(path, columns=["id:qid"])) == [Prompt(1, (png(1),), (Message("user", "<image>What?"),))]


class TestPictures:
  def test_forms(self, tmp_path):
    """Bytes, base64, data: URLs, paths and datasets' own form, one or a list."""
    (tmp_path / "a.png").write_bytes(png(1))
    text = base64.b64encode(png(1)).decode()
    own = [
      {"qid": n, "q": "?", "img": image} for n, image in enumerate((text, f"data:image/png;base64,{text}", "a.png"))
    ]
    found = list(read(write_parquet(tmp_path / "text.parquet", own, image=pa.string())))
    found += read(write_parquet(tmp_path / "bytes.parquet", [own[0] | {"img": png(1)}], image=pa.binary()))
    lists = [{"bytes": png(1), "path": None}, {"bytes": None, "path": "a.png"}]
    found += read(write_parquet(tmp_path / "list.parquet", [own[0] | {"img": lists}], image=pa.list_(EMBEDDED)))
    files = PictureFiles(tmp_path)
    digests = [files.load(image)[1] for prompt in found for image in prompt.images]
    assert len(digests) == 6 and len(set(digests)) == 1
    assert {files.size(image) for prompt in found for image in prompt.images} == {(6, 5)}

  def test_none_and_what_is_none(self, tmp_path):
    own = [
      row | {"img": image} for row, image in zip(rows([1, 2, 3]), (None, {"path": None}, {"bytes": b"x"}), strict=True)
    ]
    none, absent, damaged = read(write_parquet(tmp_path / "a.parquet", own))
    assert none == Prompt(1, (), "What is 1?")
    assert absent == Prompt(2, error='row 2: "img": "bytes" or "path" is missing')
    with pytest.raises(UserError, match="the picture of 1 bytes in the row: not an image of a supported format"):
      PictureFiles().load(damaged.images[0])
    numbers = write_parquet(tmp_path / "b.parquet", [row | {"img": 3} for row in rows([1])], image=pa.int64())
    assert [prompt.error for prompt in read(numbers)] == [
      'row 1: "img" must be a string or a list of strings, not a number'
    ]


class TestReading:
  """Only what is needed is read, so damage elsewhere does not show."""

  @pytest.fixture
  def damaged(self, tmp_path):
    """Ten rows in five groups; of the second the pictures are damaged."""
    own = [
      row | {"img": {"bytes": np.random.default_rng(row["qid"]).bytes(5000), "path": None}} for row in rows(range(10))
    ]
    path = write_parquet(tmp_path / "a.parquet", own)
    data = path.read_bytes()
    at = data.index(own[3]["img"]["bytes"][:100])
    column = parquet.ParquetFile(path).metadata.row_group(1).column(1)
    start = column.dictionary_page_offset or column.data_page_offset
    assert start < at < start + column.total_compressed_size
    path.write_bytes(data[:start] + b"\xff" * 40 + data[start + 40 :])
    return path

  def test_ids_without_pictures_and_groups_without_wanted_rows(self, damaged):
    found = read(damaged)
    assert len(found) == 10
    wanted = np.array([True] * 2 + [False] * 2 + [True] * 6)
    assert [prompt.id for prompt in found.where(wanted)] == [0, 1, *range(4, 10)]
    with pytest.raises(UserError, match="cannot read the prompt file .*a.parquet: ") as error:
      list(found)
    assert "\n" not in str(error.value)

  def test_a_row_group_is_not_held(self, tmp_path):
    """One row group of sixteen pages: some bytes for each column and a few pages are in memory."""
    bytes_of = np.random.default_rng(0).bytes
    own = [{"qid": n, "img": bytes_of(1000), "q": "?"} for n in range(16384)]
    path = write_parquet(tmp_path / "a.parquet", own, group=16384, image=pa.binary())
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in read(path)]
    assert len(held) == 16384 and max(held) < path.stat().st_size / 2

  def test_a_file_that_changes_meanwhile(self, tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"id": n, "question": "?"}) + "\n" for n in range(3)]
    path.write_text("".join(lines))
    found = read(path, columns=[])
    path.write_text("".join([*lines, lines[0], "more"]))
    assert len(list(found)) == 3
    for others in (lines[:2], [lines[1], *lines[1:]], ["{\n", *lines[1:]]):
      path.write_text("".join(others))
      with pytest.raises(UserError, match="a.jsonl was changed while it was read; start again"):
        list(found)

  def test_torch_and_the_network_are_left_alone(self, tmp_path):
    directory = write_parquet(tmp_path / "set" / "test.parquet", rows(range(3))).parent
    code = f"""
import pathlib, socket, sys
def refuse(*_, **__):
  raise AssertionError("network")
socket.socket.connect = socket.getaddrinfo = refuse
from himap_jax.run import prompts, records
found = prompts.read_prompts(records.open_records(pathlib.Path({str(directory)!r})), prompts.Columns.parse({COLUMNS}))
assert len(list(found)) == 3 and "datasets" in sys.modules and "torch" not in sys.modules
"""
    environment = {"PATH": "", "HF_HOME": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment)
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert not kept  # `datasets` would copy the rows


class TestBad:
  def test_csv(self, tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(
      b'\xef\xbb\xbfid,image,question\r\na,a.png,"What, ""then""\nnow?"\n\nb,b.png\nc,c.png,x,y\n'
      b'd,d.png,"x"y"\ne,e.png,\xff\nf,,z\nf,,z\n,g.png,z\nh,h.png,\ni,i.png,"open\nj,j.png,z\n'
    )
    found = list(read(path, columns=[]))
    assert found[0] == Prompt("a", ("a.png",), 'What, "then"\nnow?') and found[5] == Prompt("f", (), "z")
    errors = {prompt.id: prompt.error for prompt in found if prompt.error}
    assert errors == {
      "line:5": "line 5: not valid CSV: 2 fields, but the first line names 3",
      "line:6": "line 6: not valid CSV: 4 fields, but the first line names 3",
      "line:7": "line 7: not valid CSV: ',' expected after '\"'",
      "line:8": "line 8: not UTF-8",
      "line:10": 'line 10: the id "f" was already used on line 9',
      "line:11": 'line 11: "id" or "question_id" is missing',
      "h": 'line 12: "question" or "text" is missing',
      "line:13": "line 13: not valid CSV: unexpected end of data",
    }

  def test_ids_that_repeat(self, tmp_path):
    for number in range(2):
      write_parquet(tmp_path / f"test-{number}.parquet", [*rows([5, 6]), rows([5])[0] | {"qid": None}])
    found = list(read(tmp_path))
    assert [prompt.id for prompt in found] == [5, 6, "test-0.parquet:3", *(f"test-1.parquet:{n}" for n in (1, 2, 3))]
    assert found[3].error == "row 1 of test-1.parquet: the id 5 was already used on row 1 of test-0.parquet"
    assert found[2].error == 'row 3 of test-0.parquet: "qid" is missing'

  @pytest.mark.parametrize(
    ("columns", "message"),
    [
      ([], "a.parquet has no column id or question_id; it has qid, img, q, more; name the one to use with --columns=id:NAME, or --columns=id: to number the rows"),
      (["id:qid"], "has no column question or text; it has"),
      (["id:qid", "question:q"], "has no column image; .*--columns=image:NAME, or --columns=image: if there are no pict"),
      ([*COLUMNS[:2], "question:prompt"], "has no column prompt; it has qid, img, q, more"),
      ([*COLUMNS, "messages:chat"], "has no column chat; it has"),
      (["img:image"], "--columns: unknown field 'img' in 'img:image'; known: id, image, question, messages"),
      (["id:qid", "id:q"], "--columns: 'id:q' does not name one column for id"),
      (["id"], "--columns: 'id' does not name one column for id, as in id:theirs"),
      (["question:"], "--columns: 'question:' does not name one column for question"),
    ],
  )  # fmt: skip
  def test_columns(self, tmp_path, columns, message):
    path = write_parquet(tmp_path / "a.parquet", rows([1]))
    with pytest.raises(UserError, match=message):
      read(path, columns=columns)

  def test_an_open_quote_in_the_names_of_columns(self, tmp_path):
    (tmp_path / "a.csv").write_text('id,"image,question\n1,a.png,Why?\n"\n')
    with pytest.raises(UserError, match="it has id, image,question 1,a.png,Why[?]; name the one") as error:
      read(tmp_path / "a.csv")
    assert "\n" not in str(error.value)

  def test_no_pictures(self, tmp_path):
    path = write_parquet(tmp_path / "a.parquet", rows([1]))
    assert list(read(path, columns=["id:qid", "question:q", "image:"])) == [Prompt(1, (), "What is 1?")]

  def test_rows_that_are_numbered(self, tmp_path):
    for number in range(2):
      write_parquet(tmp_path / "test" / str(number) / "a.parquet", rows([number, number]))
    columns = ["id:", *COLUMNS[1:]]
    assert list(read(tmp_path / "test" / "1" / "a.parquet", columns=columns)) == [
      Prompt(f"row:{number}", (png(1),), "What is 1?") for number in (1, 2)
    ]
    found = read(tmp_path, columns=columns)
    assert found.keys == [prompt.id for prompt in found] == [f"{a}/a.parquet:{b}" for a in (0, 1) for b in (1, 2)]
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"id": 3, "question": "?"}\n{\n')
    assert next(iter(read(path, columns=["id:"]))) == Prompt("line:2", (), "?")

  def test_a_column_of_a_line(self, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"qid": 1, "id": 2, "q": "?", "text": "!"}\n{"id": 3, "text": "?"}\n{"qid": 4, "text": "?"}\n')
    assert list(read(path)) == [
      Prompt(1, (), "?"),
      Prompt("line:2", error='line 2: "qid" is missing'),
      Prompt(4, error='line 3: "q" is missing'),
    ]

  @pytest.mark.parametrize("suffix", ["parquet", "arrow"])
  def test_one_value_that_cannot_be_read(self, tmp_path, suffix):
    """The other rows stay as they are."""
    texts = pa.array([f"text {n}".encode() for n in range(20)])
    spoiled = {2: "q", 3: "qid", 5: "messages", 7: "more", 18: "q"}
    own = {}
    for name in ("qid", "q", "more", "messages"):
      raw = [b"a\xff" if spoiled.get(n) == name else text.as_py() for n, text in enumerate(texts)]
      own[name] = pa.Array.from_buffers(pa.string(), 20, pa.array(raw).buffers())
    chats = pa.ListArray.from_arrays(
      pa.array(np.arange(21), pa.int32()), pa.StructArray.from_arrays([own["messages"]], ["role"])
    )
    own["messages"] = pa.compute.if_else(pa.array([n == 5 for n in range(20)]), chats, None)
    path, table = tmp_path / f"a.{suffix}", pa.table(own)
    if suffix == "parquet":
      parquet.write_table(table, path)
    else:
      with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)
    source = records.open_records(path) if suffix == "parquet" else records._of_files(path, [path], "arrow")
    found = list(prompts.read_prompts(source, Columns.parse(["id:qid", "image:", "question:q"])))
    assert {n: prompt.error for n, prompt in enumerate(found) if prompt.error} == {
      2: 'row 3: "q" is not UTF-8: invalid start byte at byte 2',
      3: 'row 4: "qid" is not UTF-8: invalid start byte at byte 2',
      5: 'row 6: "messages" is not UTF-8: invalid start byte at byte 2',
      18: 'row 19: "q" is not UTF-8: invalid start byte at byte 2',
    }
    assert [prompt.id for prompt in found] == ["row:4" if n == 3 else f"text {n}" for n in range(20)]
    assert [prompt.question for prompt in found] == ["" if n in spoiled and n != 7 else f"text {n}" for n in range(20)]

  def test_a_date_that_python_does_not_have(self, tmp_path):
    own = {"id": ["a", "b"], "question": pa.array([2**31 - 1, 0], pa.date32())}
    parquet.write_table(pa.table(own), tmp_path / "a.parquet")
    first, second = read(tmp_path / "a.parquet", columns=["image:"])
    assert first.error.startswith('row 1: "question" is not readable: ')
    assert second.error == 'row 2: "question" must be a string, not a date'

  @pytest.mark.parametrize(
    "spoil", [lambda data: data[:-100], lambda data: data[:50], lambda data: b"", lambda data: b"{}\n"]
  )
  def test_a_damaged_table(self, tmp_path, spoil):
    path = write_parquet(tmp_path / "a.parquet", rows([1]))
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(UserError, match="cannot read the prompt file .*a.parquet: ") as error:
      read(path)
    assert "\n" not in str(error.value)

  @pytest.mark.parametrize(
    "data, message",
    [
      (b'\xef\xbb\xbf \n[{"id": 1, "question": "?"}]', "is a JSON array; it must have one JSON object on each line"),
      (png(1), "is not text; tables end with .parquet or .csv, any other file is JSONL"),
      (b'{\n "id": 1,\n "question": "?"\n}\n', "is a JSON object with fields; line 1: not valid JSON"),
    ],
  )
  def test_what_is_no_jsonl_is_said_once(self, tmp_path, data, message):
    (tmp_path / "prompts").write_bytes(data)
    with pytest.raises(UserError, match=message):
      read(tmp_path / "prompts", columns=[])

  def test_what_is_no_file(self, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (pathlib.Path("/dev/zero"), tmp_path / "pipe"):
      with pytest.raises(UserError, match=f"{path}: not a regular file, and prompts are read more than once"):
        read(path)

  def test_a_line_without_an_end(self, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_MAX_LINE_BYTES", 1 << 20)
    lines = [json.dumps({"id": n, "question": "x" * length}) for n, length in enumerate((5, (1 << 22) + 1, 1 << 20, 6))]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    found = list(read(tmp_path / "a.jsonl", columns=[]))
    assert [prompt.error for prompt in found] == [None, "line 2: longer than 1 MiB", "line 3: longer than 1 MiB", None]

  def test_a_line_of_csv_without_an_end(self, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_MAX_LINE_BYTES", 1 << 20)
    path, lengths = tmp_path / "a.csv", (5, (1 << 22) + 1, 6, 7)
    lines = ["id,image,question", *(f"{n},,{'x' * length}" for n, length in enumerate(lengths)), '8,,"?\r?"', "9"]
    path.write_text("\r".join(lines))
    errors = {prompt.id: prompt.error for prompt in read(path, columns=[])}
    assert errors == dict.fromkeys("0238") | {
      "line:3": "line 3: not valid CSV: a line is longer than 1 MiB",
      "line:8": "line 8: not valid CSV: 1 fields, but the first line names 3",
    }
    path.write_bytes(b"")
    os.truncate(path, 1 << 36)
    with pytest.raises(UserError, match="a.csv: the line of column names is not valid CSV: a line is longer than 1 M"):
      read(path)

  @pytest.mark.parametrize("text", ["", "\n1,a.png,Why?\n"])
  def test_a_csv_without_names_of_columns(self, tmp_path, text):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match="a.csv: its first line is empty; it must name the columns"):
      read(tmp_path / "a.csv")

  def test_columns_of_one_name(self, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,image,question,,,question\n1,,Why?,,,Who?\n")
    with pytest.raises(UserError, match="a.csv: several columns have the name 'question'"):
      read(path, columns=[])
    path.write_text("id,image,question,,\n1,,Why?,,\n")
    assert list(read(path, columns=[])) == [Prompt("1", (), "Why?")]

  def test_fields_that_mean_nothing(self, tmp_path):
    (tmp_path / "a.jsonl").write_text(
      '{"id": 1, "question": "?", "max_tokens": 3}\n{"id": 2, "text": "?", "stop": "."}'
    )
    assert read(tmp_path / "a.jsonl", columns=[]).ignored == ("max_tokens",)
    assert read(write_parquet(tmp_path / "a.parquet", rows(range(2)))).ignored == ("more",)

  def test_splits(self, tmp_path):
    for name in ("test", "validation"):
      write_parquet(tmp_path / f"{name}.parquet", rows([1]))
    for split, message in ((None, "choose one with --split"), ("dev", "not --split=dev")):
      with pytest.raises(UserError, match=f"has the splits .*; {message}") as error:
        read(tmp_path, split)
      assert "test" in str(error.value) and "validation" in str(error.value)
    with pytest.raises(UserError, match="--split=test: .*test.parquet is a file; only directories"):
      read(tmp_path / "test.parquet", "test")

  def test_what_is_no_data_set(self, tmp_path):
    with pytest.raises(UserError, match="is no data set: The directory at .* doesn't contain any data files"):
      read(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(
      UserError, match="has files of another kind .a.txt.; supported are parquet, csv, jsonl and arrow"
    ):
      read(tmp_path)
    with pytest.raises(
      UserError, match="nobody/nothing: no such file or directory, and it cannot be downloaded"
    ) as error:
      read(pathlib.Path("nobody/nothing"))
    assert "\n" not in str(error.value)
    for name in ("nobody/nothing.csv", "nobody/nothing.CSV"):
      with pytest.raises(UserError, match=f"cannot read the prompt file {name}: No such file"):
        read(pathlib.Path(name))
    with pytest.raises(UserError, match="q.TSV: tables end with .parquet or .csv, whose fields commas separate"):
      read(pathlib.Path("q.TSV"))

  def test_without_the_extra(self, tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", rows([1]))
    for name, own in (("pyarrow", path), ("datasets", tmp_path)):
      with monkeypatch.context() as patch:
        patch.setitem(sys.modules, name, None)
        with pytest.raises(UserError, match=r"this needs the extra `data`: pip install 'himap_jax\[data\]'"):
          read(own)
