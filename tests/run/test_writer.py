import json
import os
import pathlib

import commands
import pytest

from himap_jax.errors import UserError
from himap_jax.run.writer import OutputWriter

ROOT = pathlib.Path(__file__).parents[2]


def row(row_id, answer="yes", **extra):
  return {"id": row_id, "answer": answer, "error": None, "digest": "a-b", **extra}


def read(path):
  text = path.read_text()
  assert not text or text.endswith("\n")
  return [json.loads(line) for line in text.split("\n")[:-1]]


@pytest.fixture
def path(tmp_path):
  return tmp_path / "answers.jsonl"


def test_rows_come_back(path):
  odd = "a\nb\r\u2028\x85\u2029 \x1c é \ud800 \U0001f600"
  with OutputWriter(path, resume=False) as writer:
    writer.write([row(1, odd), row("2", token_ids=[1, 2])])
    assert read(path) == [row(1, odd), row("2", token_ids=[1, 2])]
    writer.write([row("c")])
  assert len(path.read_text().splitlines()) == 3
  with OutputWriter(path, resume=True) as writer:
    assert writer.answered == {"1", "2", "c"}


def test_a_batch_is_one_write(path, monkeypatch):
  with OutputWriter(path, resume=True) as writer:
    writes = []
    file = writer._file

    class Recorder:
      def __getattr__(self, name):
        return getattr(file, name)

      def write(self, data):
        writes.append(len(data))
        return file.write(data)

    writer._file = Recorder()
    writer.write([row(n, "x" * 100_000) for n in range(20)])
  assert writes == [path.stat().st_size]


def failed(row_id):
  return {"id": row_id, "answer": None, "error": "no image", "digest": "a-b"}


def retry(*keys):
  return lambda row: row["error"] is not None and str(row["id"]) in keys


def test_resume_keeps_rows_and_takes_out_the_errors_that_are_to_be_tried_again(path):
  with OutputWriter(path, resume=True) as writer:
    assert writer.answered == set()
    writer.write([row("a"), failed("b"), failed("c"), failed(1), row("2")])
    assert writer.answered == {"a", "b", "c", "1", "2"}
  with path.open("a") as file:
    file.write('{"id": "torn')
  with OutputWriter(path, resume=True, is_stale=retry("a", "b", "1")) as writer:
    assert read(path) == [row("a"), failed("b"), failed("c"), failed(1), row("2")]
    assert writer.answered == {"a", "c", "2"}
    with pytest.raises(UserError, match="another run is writing"):
      OutputWriter(path, resume=True)
    writer.write([row("b")])
    assert read(path) == [row("a"), failed("c"), row("2"), row("b")]
    with pytest.raises(UserError, match="another run is writing"):
      OutputWriter(path, resume=True)
  assert read(path) == [row("a"), failed("c"), row("2"), row("b")]
  assert sorted(os.listdir(path.parent)) == [path.name]


def test_rows_with_errors_survive_a_disk_that_is_full(path, monkeypatch):
  path.write_text("".join(json.dumps(r) + "\n" for r in (row("a"), failed("b"))))
  before = path.read_bytes()

  def full(descriptor):
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(os, "fsync", full)
    with OutputWriter(path, resume=True, is_stale=retry("b")) as writer:
      with pytest.raises(UserError, match="cannot write the output .*answers.jsonl: No space left"):
        writer.write([row("b")])
  assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]
  OutputWriter(path, resume=True).close()


def test_without_resume_rows_are_replaced_at_the_first_batch(path):
  path.write_text("anything\nat all, torn")
  with OutputWriter(path, resume=False) as writer:
    assert writer.answered == set()
    assert path.read_text() == "anything\nat all, torn"
    writer.write([row("a")])
    writer.write([row("b")])
  assert [r["id"] for r in read(path)] == ["a", "b"]


@pytest.mark.parametrize(
  ("rows", "error", "message"),
  [
    ([row("new"), row("old")], ValueError, "'old' already has"),
    ([row("new"), row("new")], ValueError, "'new' already has"),
    ([row("new"), {"id": "x", "answer": "y", "error": None}], ValueError, "needs id, answer, error, digest"),
    ([row("new"), row("x", logits=[float("nan")])], ValueError, "JSON compliant"),
    ([row("new"), row("x", kept={1, 2})], TypeError, "set"),
  ],
)
def test_a_refused_batch_writes_nothing(path, rows, error, message):
  with OutputWriter(path, resume=True) as writer:
    writer.write([row("old")])
    with pytest.raises(error, match=message):
      writer.write(rows)
    writer.write([row("new")])
  assert [r["id"] for r in read(path)] == ["old", "new"]


def test_torn_at_every_byte(path):
  rows = [row("a"), row("é", "\u2028 {}"), row(3, "x\ny")]
  whole = "".join(json.dumps(r) + "\n" for r in rows).encode()
  ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
  for length in range(len(whole) + 1):
    path.write_bytes(whole[:length])
    complete = sum(length >= end - 1 for end in ends)
    ids = {str(r["id"]) for r in rows[:complete]}
    with OutputWriter(path, resume=True) as writer:
      assert writer.answered == ids
    assert length == 0 or read(path) == rows[:complete]
    with OutputWriter(path, resume=True) as writer:
      writer.write([r for r in rows if str(r["id"]) not in writer.answered])
    assert read(path) == rows


@pytest.mark.parametrize(
  "text",
  [
    'ROW\n{"id": "b", "answ\nROW\n',
    "ROW\n[]\n",
    "ROW\nnot a row, and no newline",
    'ROW\n{"id": 2, "image": "a.png", "question": "q"}',
    'ROW\n{"id": [2], "answer": "", "error": null, "digest": ""}\n',
    'ROW\n{"id": true, "answer": "", "error": null, "digest": ""}\n',
    'ROW\n{"answer": "", "error": null, "digest": ""}\n',
    'ROW\n{"id": "b", "answer": "", "error": null}\n',
    'ROW\n{"id": "b", "answer": "", "error": null, "digest": null}\n',
  ],
)
def test_a_file_that_is_not_an_output_is_left_alone(path, text):
  text = text.replace("ROW", json.dumps(row("a")))
  path.write_text(text)
  with pytest.raises(UserError, match="answers.jsonl: line 2 is not an output"):
    OutputWriter(path, resume=True)
  assert path.read_text() == text
  OutputWriter(path, resume=False).close()


def test_a_row_that_is_there_twice_is_refused(path):
  text = "".join(json.dumps(row(id)) + "\n" for id in ("1", "b", 1))
  path.write_text(text)
  with pytest.raises(UserError, match="line 3 repeats the id 1; remove all but one of its rows"):
    OutputWriter(path, resume=True)
  assert path.read_text() == text


def test_other_bytes_are_not_an_output(path):
  path.write_bytes(b"\x89PNG\r\n\x1a\n\xff")
  with pytest.raises(ValueError, match="line 1 is not an output row"):
    OutputWriter(path, resume=True)


def test_blank_lines_are_harmless(path):
  path.write_text("\n" + json.dumps(row("a")) + "\n\n")
  with OutputWriter(path, resume=True) as writer:
    assert writer.answered == {"a"}


def test_a_file_without_a_row_is_removed_again(path):
  with OutputWriter(path, resume=True) as writer:
    assert writer.answered == set() and path.exists()
  assert not path.exists()
  path.touch()
  OutputWriter(path, resume=False).close()
  assert path.exists()


def test_a_number_and_its_text_are_one_id(path):
  with OutputWriter(path, resume=True) as writer:
    writer.write([row(1)])
    with pytest.raises(ValueError, match="'1' already has an output row"):
      writer.write([row("1")])


def unwritable(tmp_path):
  (tmp_path / "file").write_text("")
  yield tmp_path
  yield tmp_path / "absent" / "answers.jsonl"
  yield tmp_path / "file" / "answers.jsonl"
  yield tmp_path / ("x" * 300)
  yield "/dev/full"
  yield "/proc/answers.jsonl"
  yield ""
  yield "a\0b"


def test_unwritable(tmp_path):
  for path in unwritable(tmp_path):
    for resume in (True, False):
      with pytest.raises(UserError) as caught:
        OutputWriter(path, resume=resume)
      assert "\n" not in str(caught.value)


def test_no_permission(tmp_path):
  tmp_path.chmod(0o500)
  user = os.geteuid()
  if user == 0:
    os.seteuid(65534)  # root may write anywhere
  try:
    with pytest.raises(UserError, match="Permission denied"):
      OutputWriter(tmp_path / "answers.jsonl", resume=True)
  finally:
    os.seteuid(user)


def test_full_disk_takes_back_what_was_written(path):
  code = """
import resource, signal, sys
from himap_jax.errors import UserError
from himap_jax.run.writer import OutputWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
with OutputWriter(sys.argv[1], resume=True) as writer:
    writer.write([{"id": "a", "answer": "x" * 500, "error": None, "digest": "a-b"}])
    try:
        writer.write([{"id": "b", "answer": "x" * 5000, "error": None, "digest": "a-b"}])
    except UserError:
        assert writer.answered == {"a"}
    else:
        raise AssertionError
"""
  commands.Command(code, path).succeeded()
  assert [r["id"] for r in read(path)] == ["a"]


def test_a_link_stays_and_leads_to_the_new_rows(path, tmp_path):
  (tmp_path / "disk").mkdir()
  target = tmp_path / "disk" / "rows.jsonl"
  path.symlink_to(target)
  with OutputWriter(path, resume=True) as writer:
    writer.write([row("1", "old"), row("2")])
  with OutputWriter(path, resume=True, is_stale=lambda own: own["answer"] == "old") as writer:
    writer.write([row("1", "new")])
  assert path.is_symlink() and read(target) == [row("2"), row("1", "new")]
  assert [own.name for own in (tmp_path / "disk").iterdir()] == ["rows.jsonl"]


def test_two_writers(path):
  with OutputWriter(path, resume=True) as writer:
    writer.write([row("a")])
    for resume in (True, False):
      with pytest.raises(UserError, match="another run is writing"):
        OutputWriter(path, resume=resume)
    other = commands.Command(WORKER, path)
    assert "another run is writing the output" in other.communicate()[1]
    assert other.process.exitcode != 0
    assert read(path) == [row("a")]
    writer.write([row("b")])
  OutputWriter(path, resume=True).close()
  assert [r["id"] for r in read(path)] == ["a", "b"]


WORKER = """
import sys
from himap_jax.run.writer import OutputWriter
with OutputWriter(sys.argv[1], resume=True) as writer:
    left = [n for n in range(200) if str(n) not in writer.answered]
    print("ready", flush=True)
    for start in range(0, len(left), 3):
        batch = left[start : start + 3]
        writer.write(
            [{"id": n, "answer": "x" * 300_000, "error": None, "digest": "a-b"} for n in batch]
        )
"""


def test_killed_while_writing_and_started_again(path):
  kills = 0
  for attempt in range(5):
    kills += commands.Command(WORKER, path).killed_after("ready", seconds=0.01 + 0.013 * attempt)
    if path.exists() and path.stat().st_size:
      with path.open("ab") as file:
        file.write(b'{"id": 199, "answer": "xx')
  assert kills > 0
  commands.Command(WORKER, path).succeeded()
  assert sorted(r["id"] for r in read(path)) == list(range(200))
