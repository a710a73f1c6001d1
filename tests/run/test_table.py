"""Outputs in parquet: the promises of JSON lines, and a whole table at the end."""

import json
import os
import pathlib
import sys

import commands
import pyarrow as pa
import pytest
from pyarrow import parquet

from himap_jax import UserError
from himap_jax.run.table import TableWriter, read_table

ROOT = pathlib.Path(__file__).parents[2]


def row(row_id, answer="yes", **extra):
  return {"id": row_id, "answer": answer, "error": None, "digest": "a-b", **extra}


def failed(row_id):
  return {"id": row_id, "answer": None, "error": "no image", "digest": "a-b"}


def read(path):
  return parquet.read_table(path).to_pylist()


def names(path):
  return sorted(other.name for other in path.parent.iterdir())


@pytest.fixture
def path(tmp_path):
  return tmp_path / "answers.parquet"


def test_rows_and_types(path):
  more = dict(
    token_ids=[1, 2], kept=[[0, 3], []], kept_patches=[[[0, 0, 1, 2]], []], first_logits=[0.5, -1e-9],
    counts={"tiles": 1, "image_tokens": 4, "text_tokens": 7, "kept": [2, 0]},
    timing={"prefill_seconds": 0.1, "decode_seconds": 2.0},
  )  # fmt: skip
  own = [row(1, "é\u2028\x00", **more), failed(2)]
  with TableWriter(path, resume=True) as writer:
    writer.write(own[:1])
    assert names(path) == ["answers.parquet.jsonl"]
    writer.write(own[1:])
  assert names(path) == [path.name]
  schema = parquet.read_schema(path)
  assert (schema.field("id").type, schema.field("first_logits").type) == (pa.int64(), pa.list_(pa.float32()))
  first, second = read(path)
  assert first | {"first_logits": None} == own[0] | {"first_logits": None}
  assert first["first_logits"] == pytest.approx(more["first_logits"])
  assert second == own[1] | dict.fromkeys(more)
  with TableWriter(path, resume=True) as writer:
    assert writer.answered == {"1", "2"}
    writer.write([row(3)])
  assert read(path)[:2] == [first, second] and read(path)[2] == row(3) | dict.fromkeys(more)


def test_ids_of_two_kinds_are_text(path):
  with TableWriter(path, resume=True) as writer:
    writer.write([row(1), row("a"), row(1 << 70)])
  assert [own["id"] for own in read(path)] == ["1", "a", str(1 << 70)]


def test_more_rows_than_a_group(path, monkeypatch):
  monkeypatch.setattr("himap_jax.run.table.GROUP_ROWS", 3)
  own = [failed(n) for n in range(4)] + [row(n) for n in range(4, 8)]
  with TableWriter(path, resume=True) as writer:
    writer.write(own)
  assert read(path) == own and parquet.ParquetFile(path).num_row_groups == 3


def test_rows_with_logits_are_not_held(path, monkeypatch):
  """A thousand of them may take more memory than there is: groups are small, and of a larger one few rows are read."""
  monkeypatch.setattr("himap_jax.run.table.GROUP_BYTES", 3000)
  own = [row(n, first_logits=[0.5] * 200) for n in range(5)]
  with TableWriter(path, resume=True) as writer:
    writer.write(own)
  groups = parquet.ParquetFile(path).metadata
  assert read(path) == own and [groups.row_group(n).num_rows for n in range(groups.num_row_groups)] == [3, 2]

  counts = []
  iter_batches = parquet.ParquetFile.iter_batches

  def counted(*arguments):
    for batch in iter_batches(*arguments):
      counts.append(batch.num_rows)
      yield batch

  parquet.write_table(pa.Table.from_pylist(own * 200), path)
  monkeypatch.setattr(parquet.ParquetFile, "iter_batches", counted)
  assert list(read_table(path)) == own * 200 and max(counts) <= 16


class TestResume:
  @pytest.fixture
  def before(self, path):
    with TableWriter(path, resume=True) as writer:
      writer.write([row("a"), failed("b"), row("c")])
    return path.read_bytes()

  def test_what_is_stale_is_replaced(self, path, before):
    with TableWriter(path, resume=True, is_stale=lambda own: own["error"] is not None) as writer:
      assert writer.answered == {"a", "c"}
      writer.forget({"c"})
      with pytest.raises(UserError, match="another run is writing the output .*answers.parquet.jsonl"):
        TableWriter(path, resume=True)
      assert path.read_bytes() == before
      writer.write([row("b", "now"), row("c", "new")])
      assert path.read_bytes() == before
    assert read(path) == [row("a"), row("b", "now"), row("c", "new")] and names(path) == [path.name]

  def test_a_link_stays(self, path, before, tmp_path):
    target = tmp_path / "disk" / "table.parquet"
    target.parent.mkdir()
    path.rename(target)
    path.symlink_to(target)
    with TableWriter(path, resume=True) as writer:
      writer.write([row("d")])
    assert path.is_symlink() and len(read(target)) == 4

  def test_nothing_new_changes_nothing(self, path, before):
    times = path.stat().st_mtime_ns
    TableWriter(path, resume=True).__exit__(None)
    with pytest.raises(KeyboardInterrupt), TableWriter(path, resume=True):
      raise KeyboardInterrupt
    assert names(path) == [path.name] and (path.read_bytes(), path.stat().st_mtime_ns) == (before, times)

  def test_a_refusal_changes_nothing(self, path, before):
    def refuse(own):
      raise UserError("other settings")

    with pytest.raises(UserError, match="other settings"):
      TableWriter(path, resume=True, is_stale=refuse)
    assert names(path) == [path.name] and path.read_bytes() == before

  def test_interrupted(self, path, before):
    with pytest.raises(KeyboardInterrupt), TableWriter(path, resume=True) as writer:
      writer.write([row("d")])
      raise KeyboardInterrupt
    assert names(path) == [path.name, "answers.parquet.jsonl"] and path.read_bytes() == before
    with path.with_name("answers.parquet.jsonl").open("a") as file:
      file.write('{"id": "torn')
    with TableWriter(path, resume=True) as writer:
      assert writer.answered == {"a", "b", "c", "d"}
    assert [own["id"] for own in read(path)] == list("abcd") and names(path) == [path.name]

  def test_killed_before_it_took_over_the_rows(self, path, before):
    path.with_name("answers.parquet.jsonl").touch()
    path.with_name("answers.parquet.jsonl.partial").write_text(json.dumps(row("a")))
    with TableWriter(path, resume=True) as writer:
      assert writer.answered == {"a", "b", "c"}

  def test_noresume(self, path, before):
    with pytest.raises(KeyboardInterrupt), TableWriter(path, resume=False) as writer:
      assert writer.answered == set()
      raise KeyboardInterrupt
    assert names(path) == [path.name] and path.read_bytes() == before
    with TableWriter(path, resume=False) as writer:
      writer.write([row("z")])
      assert path.read_bytes() == before
    assert read(path) == [row("z")] and names(path) == [path.name]

  def test_a_full_disk_at_the_end(self, path, before, monkeypatch):
    def full(*_):
      raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="cannot write the output .*answers.parquet: No space left"):
      with TableWriter(path, resume=True) as writer:
        writer.write([row("d")])
        monkeypatch.setattr(os, "fsync", full)
    monkeypatch.undo()
    assert path.read_bytes() == before and names(path) == [path.name, "answers.parquet.jsonl"]
    TableWriter(path, resume=True).__exit__(None)
    assert len(read(path)) == 4


@pytest.mark.parametrize("content", [b"", b"notes\n", "table"])
def test_what_is_no_output_is_left_alone(path, content):
  if content == "table":
    parquet.write_table(pa.table({"id": [1], "question": ["?"]}), path)
  else:
    path.write_bytes(content)
  before = path.read_bytes()
  with pytest.raises(UserError, match="cannot read the output .*answers.parquet|answers.parquet is not an output"):
    TableWriter(path, resume=True)
  assert path.read_bytes() == before and names(path) == [path.name]


def test_what_is_not_utf_8(path):
  text = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"]).buffers())
  parquet.write_table(pa.table({"id": [1], "answer": text, "error": [None], "digest": ["a"]}), path)
  with pytest.raises(UserError, match="cannot read the output .*answers.parquet: 'utf-8' codec can't decode"):
    TableWriter(path, resume=True)
  assert names(path) == [path.name]


def test_a_directory_and_a_missing_extra(path, monkeypatch):
  path.mkdir()
  with pytest.raises(UserError, match="cannot write the output .*answers.parquet: not a regular file"):
    TableWriter(path, resume=True)
  monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
  with pytest.raises(UserError, match="--output=.*answers.parquet: parquet needs the extra `data`"):
    TableWriter(path, resume=True)


def test_no_rows_make_no_table(path):
  TableWriter(path, resume=True).__exit__(None)
  assert names(path) == []


WORKER = """
import pathlib, sys
from himap_jax.run.table import TableWriter
with TableWriter(pathlib.Path(sys.argv[1]), resume=True) as writer:
  left = [n for n in range(int(sys.argv[2])) if str(n) not in writer.answered]
  print("ready", flush=True)
  for start in range(0, len(left), 3):
    writer.write([{"id": n, "answer": "x" * 50_000, "error": None, "digest": "a-b"} for n in left[start : start + 3]])
"""


def test_killed_anywhere(path):
  """Also while it takes over the rows of the table, and while it makes the new one."""
  kills = 0
  for attempt in range(2):
    count = 100 * (attempt + 1)
    kills += commands.Command(WORKER, path, count).killed_after("ready", seconds=0.1 * attempt)
    commands.Command(WORKER, path, count).succeeded()
    assert sorted(own["id"] for own in read(path)) == list(range(count))
  assert kills and names(path) == [path.name]
