"""Free memory under control groups, in folders laid out as Linux lays them out."""

import types

import pytest

from himap_jax.engine import host_memory

MIB = 1 << 20


@pytest.fixture(autouse=True)
def machine(monkeypatch):
  monkeypatch.setattr(host_memory.psutil, "virtual_memory", lambda: types.SimpleNamespace(available=900 * MIB))


def write_group(directory, files, *, limit, usage=0, reclaimable=0):
  directory.mkdir(parents=True, exist_ok=True)
  (directory / files.limit).write_text(f"{limit}\n")
  (directory / files.usage).write_text(f"{usage}\n")
  (directory / "memory.stat").write_text(f"anon 5\n{files.reclaimable} {reclaimable}\nfile 7\n")


def available(tmp_path, lines):
  own = tmp_path / "cgroup"
  own.write_text(lines)
  return host_memory.available(own, tmp_path / "groups")


@pytest.mark.parametrize(
  "lines, root, files",
  [("0::/\n", "", host_memory.V2), ("5:cpu:/\n4:pids,memory:/\n0::/\n", "memory", host_memory.V1)],
)
def test_a_container_has_the_memory_of_its_group(tmp_path, lines, root, files):
  write_group(tmp_path / "groups" / root, files, limit=500 * MIB, usage=300 * MIB, reclaimable=100 * MIB)
  assert available(tmp_path, lines) == 300 * MIB
  write_group(tmp_path / "groups" / root, files, limit=500 * MIB, usage=501 * MIB)
  assert available(tmp_path, lines) == 0
  write_group(tmp_path / "groups" / root, files, limit=5000 * MIB)
  assert available(tmp_path, lines) == 900 * MIB


def test_the_tightest_of_nested_groups_counts(tmp_path):
  write_group(tmp_path / "groups" / "a", host_memory.V2, limit=400 * MIB, usage=100 * MIB)
  write_group(tmp_path / "groups" / "a" / "b", host_memory.V2, limit="max", usage=50 * MIB)
  assert available(tmp_path, "0::/a/b\n") == 300 * MIB
  write_group(tmp_path / "groups" / "a" / "b", host_memory.V2, limit=200 * MIB, usage=50 * MIB)
  assert available(tmp_path, "0::/a/b\n") == 150 * MIB


def test_without_groups_that_can_be_seen(tmp_path):
  assert available(tmp_path, "4:memory:/elsewhere\n0::/nowhere\n") == 900 * MIB
  assert host_memory.available(tmp_path / "absent", tmp_path) == 900 * MIB
