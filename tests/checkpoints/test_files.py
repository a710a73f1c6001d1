"""JSON files and directories that appear whole or not at all, locks, and digests of content."""

import errno
import json
import os
import pathlib
import pwd
import shutil
import signal
import time
import types

import commands
import numpy as np
import pytest
from layouts import WEIGHTS, convert_to
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from checkpoints_convert import digest, json_files, messages, store
from checkpoints_convert.digest import content_digest
from checkpoints_convert.errors import CheckpointError
from checkpoints_convert.progress import byte_bar
from himap_jax import checkpoint
from himap_jax.errors import UserError


class TestJson:
  def test_what_is_written_is_read(self, tmp_path):
    content = {"name": "äöü", "list": [1, 2.5, None], "object": {"yes": True}}
    json_files.write_json(tmp_path / "a.json", content)
    assert json_files.read_json(tmp_path / "a.json") == content
    assert (tmp_path / "a.json").read_text(encoding="utf-8").endswith("}\n")
    json_files.write_json(tmp_path / "a.json", {})
    assert json_files.read_json(tmp_path / "a.json") == {}
    assert os.listdir(tmp_path) == ["a.json"]

  def test_anyone_may_read_it_who_may_read_new_files(self, tmp_path):
    json_files.write_json(tmp_path / "a.json", {})
    (tmp_path / "b.json").write_text("{}")
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "b.json").stat().st_mode

  @pytest.mark.parametrize("moment", ["fsync", "replace"])
  def test_a_kill_leaves_the_old_file(self, tmp_path, moment):
    path = tmp_path / "a.json"
    json_files.write_json(path, {"old": 1})
    code = f"""
import os, pathlib, signal, sys
from checkpoints_convert import json_files
os.{moment} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
json_files.write_json(pathlib.Path(sys.argv[1]), {{"new": 2}})
"""
    command = commands.Command(code, path)
    command.communicate()
    assert command.process.exitcode == -signal.SIGKILL
    assert json_files.read_json(path) == {"old": 1}

  def test_a_failure_leaves_the_old_file_alone(self, tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    json_files.write_json(path, {"old": 1})

    def fail(*_):
      raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
      json_files.write_json(path, {"new": 2})
    assert json_files.read_json(path) == {"old": 1} and os.listdir(tmp_path) == ["a.json"]

  @pytest.mark.parametrize("content", ["{", "[]", "3", "\udcff"])
  def test_what_is_no_object(self, tmp_path, content):
    (tmp_path / "a.json").write_text(content, errors="surrogateescape")
    with pytest.raises(CheckpointError, match=r"a\.json: (cannot be read|not a JSON object)"):
      json_files.read_json(tmp_path / "a.json")
    with pytest.raises(CheckpointError, match=r"b\.json: cannot be read"):
      json_files.read_json(tmp_path / "b.json")


HOLDER = """
import pathlib, sys, time
from checkpoints_convert.store import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


class TestLocks:
  def test_another_process_waits_and_says_so(self, tmp_path, capsys):
    holder = commands.Command(HOLDER, tmp_path / "target", 1)
    holder.wait_until(lambda: holder.text()[0] == "held\n")
    start = time.monotonic()
    with store.locked(tmp_path / "target"):
      assert time.monotonic() - start > 0.3
    holder.communicate()
    assert capsys.readouterr().err == f"waiting for the process that is writing {tmp_path / 'target'}\n"
    assert os.listdir(tmp_path) == []

  def test_the_lock_of_a_killed_process_is_free(self, tmp_path, capsys):
    holder = commands.Command(HOLDER, tmp_path / "target", 600)
    assert holder.killed_after("held\n")
    with store.locked(tmp_path / "target"):
      pass
    assert capsys.readouterr().err == "" and os.listdir(tmp_path) == []

  def test_what_cannot_be_written_is_named(self, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="deep/target: cannot be written .*Not a directory.*HIMAP_JAX_CACHE"):
      with store.locked(tmp_path / "file" / "deep" / "target"):
        pass
    with pytest.raises(CheckpointError, match="target: cannot be written .*No space left"):
      with store.new_directory(tmp_path / "target"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert os.listdir(tmp_path) == ["file"]

  def test_no_waiting_where_no_lock_can_be_made(self):
    with pytest.raises(CheckpointError, match=r"/proc/target: cannot be written \(.*No such file"):
      with store.locked(pathlib.Path("/proc/target")):
        pass

  @pytest.mark.parametrize(
    "error",
    [
      SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
      ValueError('RESOURCE_EXHAUSTED: Error writing "a/c/0": Failed to write 9 bytes: No space left on device\nmore'),
      ValueError("RESOURCE_EXHAUSTED: Disk quota exceeded [os_error_code='122']"),
      Exception("No space left on device (os error 28)"),
    ],
  )
  def test_a_full_disk_in_the_words_of_libraries(self, tmp_path, error):
    with pytest.raises(
      CheckpointError, match="target: cannot be written .*(No space|quota).*HIMAP_JAX_CACHE"
    ) as caught:
      with store.new_directory(tmp_path / "target"):
        raise error
    assert "\n" not in str(caught.value) and os.listdir(tmp_path) == []

  @pytest.mark.parametrize(
    "error",
    [
      ValueError("a bug"),
      Exception("a bug"),
      KeyError("a"),
      *(own("No space left on device") for own in (CheckpointError, UserError)),
    ],
  )
  def test_other_errors_stay_as_they_are(self, tmp_path, error):
    with pytest.raises(type(error)) as caught, store.new_directory(tmp_path / "target"):
      raise error
    assert caught.value is error and os.listdir(tmp_path) == []

  def test_parameters_need_space(self, tmp_path, monkeypatch):
    """A disk that is too small is noticed before threads of Orbax print what they meet there."""
    tensors = [(("a",), np.zeros(1 << 20, np.int8)), (("b",), np.zeros(1 << 20, np.int8))]
    monkeypatch.setattr(store, "BATCH_BYTES", 1 << 20)
    disk = types.SimpleNamespace(total=1 << 30, free=(2 << 20) - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk)
    with pytest.raises(CheckpointError, match="target: cannot be written .*No space left"):
      with store.new_directory(tmp_path / "target") as (_, params):
        store.save_params(params, iter(tensors))
    assert os.listdir(tmp_path) == []

  def test_one_at_a_time(self, tmp_path):
    """Each adds one to a number in a file, slowly; waiting ones begin anew when the lock's file is removed."""
    (tmp_path / "number").write_text("0")
    code = """
import pathlib, sys, time
from checkpoints_convert.store import locked
path = pathlib.Path(sys.argv[1])
for _ in range(8):
    with locked(path):
        number = int(path.read_text())
        time.sleep(0.01)
        path.write_text(str(number + 1))
"""
    for command in [commands.Command(code, tmp_path / "number") for _ in range(3)]:
      command.succeeded()
    assert (tmp_path / "number").read_text() == "24" and os.listdir(tmp_path) == ["number"]


@pytest.fixture
def directory(checkpoints, tmp_path):
  return shutil.copytree(checkpoints("clip_mha").directory, tmp_path / "checkpoint")


@pytest.fixture
def hashed(monkeypatch):
  """The names of the files that were read."""
  names = []
  read = digest._sha256
  monkeypatch.setattr(digest, "_sha256", lambda path, advance: (names.append(path.name), read(path, advance))[1])
  return names


def digest_of(directory, cache):
  return content_digest(directory, [directory / WEIGHTS], cache)


class TestDigests:
  def test_content_decides(self, directory, tmp_path, hashed):
    cache = tmp_path / "cache"
    first = digest_of(directory, cache)
    assert len(first) == 64 and {"config.json", "tokenizer.json", "chat_template.jinja", WEIGHTS} <= set(hashed)
    os.utime(directory / WEIGHTS, ns=(1, 1))
    assert digest_of(directory, cache) == first
    assert digest_of(shutil.copytree(directory, tmp_path / "copy"), cache) == first
    tensors = load_file(directory / WEIGHTS)
    name = next(name for name in tensors if name.endswith("lm_head.weight"))
    save_file(tensors | {name: np.flip(tensors[name]).copy()}, directory / WEIGHTS)
    changed = digest_of(directory, cache)
    assert changed != first
    seen = {first, changed}
    for name in ("config.json", "tokenizer_config.json", "chat_template.jinja"):
      (directory / name).write_text((directory / name).read_text() + " ")
      seen.add(digest_of(directory, cache))
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "default.jinja").write_text("{{ messages }}")
    seen.add(digest_of(directory, cache))
    assert len(seen) == 6

  @pytest.mark.parametrize("name", ["himap_jax.json", "assembled.json"])
  def test_how_a_checkpoint_was_made_does_not(self, directory, tmp_path, name):
    first = digest_of(directory, tmp_path / "cache")
    for text in ("{}", '{"packages": []}'):
      (directory / name).write_text(text)
      assert digest_of(directory, tmp_path / "cache") == first

  def test_a_file_is_read_once(self, directory, tmp_path, hashed):
    first = digest_of(directory, tmp_path / "cache")
    hashed.clear()
    assert digest_of(directory, tmp_path / "cache") == first and hashed == []
    (directory / "config.json").write_text("{}")
    digest_of(directory, tmp_path / "cache")
    assert hashed == ["config.json"]
    os.replace(shutil.copy2(directory / WEIGHTS, tmp_path / "other"), directory / WEIGHTS)  # only the inode differs
    hashed.clear()
    digest_of(directory, tmp_path / "cache")
    assert hashed == [WEIGHTS]

  def test_a_cache_that_cannot_be_written_or_read(self, directory, tmp_path, hashed):
    expected = digest_of(directory, tmp_path / "cache")
    (tmp_path / "file").write_text("")
    hashed.clear()
    assert digest_of(directory, tmp_path / "file") == expected and WEIGHTS in hashed
    hashed.clear()
    assert digest_of(directory, tmp_path / "file") == expected and hashed == []
    (kept,) = (tmp_path / "cache" / "digests").iterdir()
    names = list(json.loads(kept.read_text()))
    for content in ("{", *(json.dumps(dict.fromkeys(names, form)) for form in (3, None, [], [[]], {}, "a"))):
      kept.write_text(content)  # cut, or written by another version
      assert digest_of(directory, tmp_path / "cache") == expected

  def test_of_a_conversion(self, directory, cache, tmp_path):
    copy = shutil.copytree(directory, tmp_path / "copy")
    first, second = convert_to(directory, tmp_path / "target"), convert_to(copy, tmp_path / "second")
    for target in (first, second):
      assert json.loads((target / "himap_jax.json").read_text())["fingerprint"] == digest_of(directory, cache)
    before = checkpoint.open_checkpoint(str(first)).digest()
    assert before == checkpoint.load(str(second), dtype=np.float32).digest()
    (first / "tokenizer.json").write_text((first / "tokenizer.json").read_text() + " ")
    assert checkpoint.open_checkpoint(str(first)).digest() != before


def test_a_user_without_a_home(monkeypatch):
  for name in ("HOME", "HIMAP_JAX_CACHE", "XDG_CACHE_HOME"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(pwd, "getpwuid", lambda user: {}[user])
  with pytest.raises(UserError, match="there is no home directory for a cache; name a directory in HIMAP_JAX_CACHE"):
    checkpoint.default_cache_dir()
  monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
  assert checkpoint.default_cache_dir() == pathlib.Path("/somewhere/himap_jax")


def test_progress_of_what_takes_a_moment_is_not_shown(capsys):
  with byte_bar(100, "reading") as bar:
    bar.update(100)
  assert capsys.readouterr().err == ""


def test_progress_is_shown_after_a_while(monkeypatch, capsys):
  now = [1000.0]
  monkeypatch.setattr("tqdm.std.time", lambda: now[0])
  with byte_bar(10_000, "reading") as bar, byte_bar(10_000, "hidden", shown=False) as hidden:
    for _ in range(4):
      now[0] += 31
      bar.update(2_500)
      hidden.update(2_500)
  shown = capsys.readouterr().err
  assert "reading:  75%" in shown and "B/s" in shown and "hidden" not in shown


@pytest.mark.parametrize(
  "message, expected",
  [
    ("cannot read it\nmore", "cannot read it"),
    (
      "Class validation error for 'x':\n\n  ValueError: 31 is odd\n",
      "Class validation error for 'x': ValueError: 31 is odd",
    ),
    ("it ends here:", "it ends here:"),
    ("", "KeyError"),
  ],
)
def test_the_first_line_of_an_error_has_its_cause(message, expected):
  error = KeyError() if not message else ValueError(message)
  assert messages.first_line(error) == expected
