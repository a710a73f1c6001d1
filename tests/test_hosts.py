"""Several processes on one machine, each with its own devices: one run, one output."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest

from himap_jax import hosts, shards
from himap_jax.hosts import Share
from himap_jax.output import OutputWriter

ROOT = pathlib.Path(__file__).parents[1]
COUNT = 60


def free_port():
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    return listener.getsockname()[1]


class Command:
  """`himap_jax.run` on prompts of its own, by any number of processes."""

  def __init__(self, directory, checkpoint, cache, images):
    self.output = directory / "output.jsonl"
    self._cache = cache
    for index, image in enumerate(images):
      image.save(directory / f"{index}.png")
    rows = [
      {"id": i, "image": f"{i % 4}.png", "question": "Is it?" if i % 3 else f"Is number {i} one of these?"}
      for i in range(COUNT)
    ]
    rows[7]["image"] = "missing.png"
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    self._arguments = [
      f"--checkpoint={checkpoint}",
      f"--prompts={directory / 'prompts.jsonl'}",
      f"--image_dir={directory}",
      f"--output={self.output}",
      "--prune_layers=2,4",
      "--keep=8,3",
      "--max_new_tokens=8",
      "--ignore_eos",
      "--prompt_buckets=16,40",
      "--prompt_template=<image>{question}",
      "--dtype=float32",
      "--emit=tokens,kept",
    ]

  def start(self, num_processes, *arguments, num_devices=4):
    environment = os.environ | {
      "HIMAP_JAX_CACHE": str(self._cache),
      "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}",
      "COLUMNS": "200",
    }
    port = free_port()
    processes = []
    for process_id in range(num_processes):
      several = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={num_processes}", f"--process_id={process_id}"]
      processes.append(
        subprocess.Popen(
          [
            sys.executable,
            "-m",
            "himap_jax.run",
            *self._arguments,
            *arguments,
            *(several if num_processes > 1 else []),
          ],
          cwd=ROOT,
          env=environment,
          text=True,
          stdout=subprocess.PIPE,
          stderr=subprocess.PIPE,
        )
      )
    return processes

  def run(self, num_processes, *arguments, **options):
    """Runs to the end; returns what the first process prints and the rows by id."""
    processes = self.start(num_processes, *arguments, **options)
    texts = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * num_processes, texts
    assert not any("answered" in text or "mesh:" in errors for text, errors in texts[1:])
    return texts[0], self.rows()

  def rows(self):
    text = self.output.read_text().replace(str(self.output.parent), "")  # errors name the picture's path
    rows = [json.loads(line) for line in text.splitlines()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


@pytest.fixture(scope="module")
def make_command(checkpoints, loaded, images, tmp_path_factory):
  cache = tmp_path_factory.mktemp("cache")
  directory = loaded("clip_mha").directory
  return lambda: Command(tmp_path_factory.mktemp("run"), directory, cache, images)


@pytest.fixture(scope="module")
def expected(make_command):
  """The rows of one process."""
  _, rows = make_command().run(1, "--batch_size=8", num_devices=1)
  assert len(rows) == COUNT and [i for i, row in rows.items() if row["error"]] == [7]
  return rows


@pytest.mark.parametrize("arguments", [("--mesh=data:2,tensor:4", "--batch_size=3"), ("--batch_size=5",)])
def test_two_processes_answer_as_one(make_command, expected, arguments):
  command = make_command()
  (table, errors), rows = command.run(2, *arguments)
  assert rows == expected
  assert f"{COUNT - 1} answered, 1 errors, 0 answered before" in table
  assert "mesh: data:" in errors
  assert not list(command.output.parent.glob("*.shard-*"))
  (table, _), again = command.run(2, *arguments)
  assert again == expected and f"0 answered, 1 errors, {COUNT - 1} answered before" in table


def test_tensor_spans_two_processes(make_command, expected):
  _, rows = make_command().run(2, "--mesh=data:1,tensor:4", "--batch_size=8", num_devices=2)
  assert rows == expected


def test_a_killed_process_ends_all_and_other_processes_go_on(make_command, expected):
  command = make_command()
  processes = command.start(2, "--mesh=data:8", "--batch_size=8")
  parts = [shards.path(command.output, Share(index, 2)) for index in range(2)]
  deadline = time.monotonic() + 200
  while not all(part.exists() and part.read_bytes().count(b"\n") >= 4 for part in parts):
    assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
    time.sleep(0.001)
  processes[1].kill()
  _, errors = processes[0].communicate(timeout=100)
  assert processes[0].returncode == 2
  assert "another process of this run ended" in errors and "Traceback" not in errors
  processes[1].communicate()
  assert all(part.exists() for part in parts)
  (table, _), rows = command.run(1, "--batch_size=8", num_devices=1)
  assert rows == expected
  before = int(table.split(" answered before")[0].split()[-1])
  assert 8 <= before < COUNT
  assert not list(command.output.parent.glob("*.shard-*"))


class TestFlags:
  @pytest.mark.parametrize(
    ("given", "message"),
    [
      (dict(coordinator="a:1"), "belong together"),
      (dict(coordinator="a:1", num_processes=2), "belong together"),
      (dict(coordinator="a:1", num_processes=2, process_id=0, from_environment=True), "finds the other processes"),
      (dict(coordinator="a:1", num_processes=2, process_id=2), "--process_id must be from 0 to 1, but is 2"),
    ],
  )
  def test_contradictions(self, given, message):
    values = dict(from_environment=False, coordinator=None, num_processes=None, process_id=None) | given
    with pytest.raises(ValueError, match=message):
      hosts.initialize(**values)

  def test_one_process_joins_nobody(self, monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: pytest.fail("joined"))
    hosts.initialize(from_environment=False, coordinator=None, num_processes=None, process_id=None)


def mesh_of(process_ids):
  devices = np.array([[types.SimpleNamespace(process_index=i) for i in row] for row in process_ids])
  return types.SimpleNamespace(devices=devices, shape=dict(zip(("data", "tensor"), devices.shape, strict=True)))


class TestShare:
  @pytest.mark.parametrize(
    ("process_ids", "share"),
    [
      ([[0, 0], [0, 0]], Share(0, 1, True)),
      ([[0, 0], [1, 1]], Share(0, 2, True)),
      ([[1, 1], [0, 0]], Share(1, 2, True)),
      ([[1, 0], [2, 3]], Share(0, 2, True)),
      ([[3, 2], [1, 0]], Share(1, 2, True)),
    ],
  )
  def test_of_process_0(self, process_ids, share):
    assert hosts.share(mesh_of(process_ids)) == share

  def test_one_of_two_processes_with_the_same_rows_writes(self, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert hosts.share(mesh_of([[0, 1], [2, 3]])) == Share(0, 2, False)

  def test_rows_that_overlap_in_part(self):
    with pytest.raises(ValueError, match="overlap in part"):
      hosts.share(mesh_of([[0, 1], [1, 0], [0, 0]]))


class TestMerge:
  def write(self, path, *rows):
    path.write_text(
      "".join(json.dumps({"id": i, "answer": answer, "error": error}) + "\n" for i, answer, error in rows)
    )

  def read(self, path):
    return [(row["id"], row["answer"]) for row in map(json.loads, path.read_text().splitlines())]

  def test_answers_take_the_place_of_errors_and_nothing_else(self, tmp_path):
    output = tmp_path / "a[1].jsonl"
    self.write(output, (1, "one", None), (2, None, "failed"), (3, None, "failed"))
    self.write(shards.path(output, Share(0, 2)), (2, "two", None), (4, "four", None), (1, "other", None))
    shards.path(output, Share(1, 2)).write_text('{"id": 5, "answer": "five", "error": null}\n{"id": 6, "ans')
    self.write(tmp_path / "b.jsonl.shard-00000-of-00002", (9, "nine", None))
    shards.merge(output)
    assert self.read(output) == [(1, "one"), (3, None), (2, "two"), (4, "four"), (5, "five")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a[1].jsonl", "b.jsonl.shard-00000-of-00002"]
    shards.merge(output)
    assert len(self.read(output)) == 5

  def test_replace(self, tmp_path):
    output = tmp_path / "a.jsonl"
    self.write(output, (1, "one", None))
    self.write(shards.path(output, Share(0, 2)), (2, "two", None))
    shards.merge(output, replace=True)
    assert self.read(output) == [(2, "two")]

  def test_not_while_a_shard_is_written(self, tmp_path):
    output = tmp_path / "a.jsonl"
    with OutputWriter(shards.path(output, Share(0, 2)), resume=True):
      with pytest.raises(ValueError, match="another run is writing"):
        shards.merge(output)
