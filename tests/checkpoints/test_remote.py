"""Conversion into object storage and loading from it; a local folder stands in for the storage."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from layouts import convert_to as convert

from checkpoints_convert import remote, store
from checkpoints_convert.stored import StoredTensor
from himap_jax import checkpoint

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  """A folder whose paths count as URLs."""
  folder = tmp_path / "bucket"
  folder.mkdir()
  monkeypatch.setattr(remote, "is_remote", lambda name: str(name).startswith(str(folder)))
  return epath.Path(folder)


@pytest.fixture
def source(checkpoints):
  return checkpoints("clip_mha").directory


def test_loads_what_a_local_conversion_loads(source, bucket, tmp_path):
  target = convert(source, bucket / "model")
  here = convert(source, tmp_path / "here")
  assert sorted(path.name for path in target.iterdir()) == sorted(path.name for path in here.iterdir())
  remote_model = checkpoint.load(str(target), dtype=jnp.float32, cache_dir=tmp_path / "cache")
  local_model = checkpoint.load(str(here), dtype=jnp.float32)
  jax.tree.map(np.testing.assert_array_equal, remote_model.model.params, local_model.model.params)
  assert remote_model.config == local_model.config and remote_model.eos_token_ids == local_model.eos_token_ids
  assert remote_model.processor.tokenizer("Why?") == local_model.processor.tokenizer("Why?")


def test_further_chat_templates_go_along(source, bucket, tmp_path):
  source = shutil.copytree(source, tmp_path / "source")
  (source / "additional_chat_templates").mkdir()
  (source / "additional_chat_templates" / "short.jinja").write_text("{{ messages }}")
  target = convert(source, bucket / "model")
  for directory in (target, store.copy_of_files(target, tmp_path / "cache")):
    assert (directory / "additional_chat_templates" / "short.jinja").read_text() == "{{ messages }}"


def test_a_copy_on_disk_has_no_digest(source, bucket, tmp_path):
  copy = shutil.copytree(convert(source, bucket / "model"), tmp_path / "copy")
  assert checkpoint.load(str(copy), dtype=jnp.float32).weights.marker["params"] is None


def test_files_are_copied_once_and_anew_when_it_changes(source, bucket, tmp_path, monkeypatch):
  target = convert(source, bucket / "model")
  cache = tmp_path / "cache"
  first = checkpoint.open_checkpoint(str(target), cache_dir=cache)
  assert first.directory.is_relative_to(cache) and first.weights.path == target / "params"
  assert not (first.directory / "params").exists()
  assert checkpoint.open_checkpoint(str(target), cache_dir=cache).directory == first.directory
  assert [path.name for path in (cache / "remote").iterdir()] == [first.directory.name]
  (target / "config.json").write_text("{}")
  with pytest.raises(ValueError, match=r"config\.json"):
    checkpoint.open_checkpoint(str(target), cache_dir=cache)


def test_a_second_conversion_has_nothing_to_do(source, bucket, monkeypatch):
  target = convert(source, bucket / "model")
  monkeypatch.setattr(StoredTensor, "reader", lambda tensor: pytest.fail("converted again"))
  assert convert(source, bucket / "model") == target


def test_an_unfinished_conversion_is_not_taken_for_one_and_is_begun_anew(source, bucket, tmp_path, monkeypatch):
  read, count = StoredTensor.reader, []

  def failing(tensor):
    count.append(1)
    if len(count) == 5:
      raise OSError("the disk is gone")
    return read(tensor)

  monkeypatch.setattr(StoredTensor, "reader", failing)
  with pytest.raises(OSError, match="gone"):
    convert(source, bucket / "model")
  with pytest.raises(ValueError, match="no converted checkpoint"):
    checkpoint.open_checkpoint(str(bucket / "model"), cache_dir=tmp_path)
  (bucket / "model" / "left over").write_text("")
  convert(source, bucket / "model")
  names = {path.name for path in (bucket / "model").iterdir()}
  assert "himap_jax.json" in names and not names & {remote.UNFINISHED, "left over"}
  checkpoint.load(str(bucket / "model"), dtype=jnp.float32, cache_dir=tmp_path)


def test_what_is_in_the_way_is_left(source, bucket):
  (bucket / "model").mkdir()
  (bucket / "model" / "mine.txt").write_text("keep")
  with pytest.raises(ValueError, match="was not converted from this source"):
    convert(source, bucket / "model")
  assert (bucket / "model" / "mine.txt").read_text() == "keep"


def test_the_marker_is_written_last(source, bucket, monkeypatch):
  written = []
  write = epath.Path.write_bytes
  monkeypatch.setattr(type(bucket), "write_bytes", lambda self, data: (written.append(self.name), write(self, data))[1])
  convert(source, bucket / "model")
  assert written[-1] == "himap_jax.json" and "config.json" in written


def test_storage_that_cannot_be_reached():
  assert remote.is_remote("gs://bucket/model") and not remote.is_remote("/gs/model")
  with pytest.raises(ValueError, match="cannot be reached.*gcsfs.*credentials"):
    checkpoint.open_checkpoint("gs://a-bucket/model")
