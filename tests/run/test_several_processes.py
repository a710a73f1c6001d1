"""Several processes on one machine, each with its own devices: one run, one output."""

import dataclasses
import json
import os
import signal
import socket
import zlib

import commands
import jax
import numpy as np
import pytest
from pyarrow import parquet

from himap_jax.engine import processes
from himap_jax.engine.processes import Share
from himap_jax.errors import UserError
from himap_jax.run import answering
from himap_jax.run.summary import Result

COUNT = 60
FEW = 12  # rows for meshes with a tensor axis, whose many threads wait for one another at every layer


def free_port():
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    return listener.getsockname()[1]


class Command:
  """`himap_jax.run` on prompts of its own, by any number of processes."""

  def __init__(self, directory, checkpoint, cache, images, count):
    self.output = directory / "output.jsonl"
    self._cache = cache
    for index, image in enumerate(images):
      image.save(directory / f"{index}.png")
    rows = [
      {"id": i, "image": f"{i % 4}.png", "question": "Is it?" if i % 3 else f"Is number {i} one of these?"}
      for i in range(count)
    ]
    rows[7]["image"] = "missing.png"
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    self._arguments = [
      f"--checkpoint={checkpoint}",
      f"--prompts={directory / 'prompts.jsonl'}",
      f"--image_dir={directory}",
      f"--output={self.output}",
      "--prune_layers=2,3",
      "--keep=8,3",
      "--max_new_tokens=8",
      "--ignore_eos",
      "--prompt_buckets=16,40",
      "--prompt_template=<image>{question}",
      "--dtype=float32",
      "--emit=tokens,kept",
    ]

  def start(self, num_processes, *arguments, num_devices=4):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={num_devices}"  # the last one counts
    environment = {"HIMAP_JAX_CACHE": str(self._cache), "XLA_FLAGS": flags, "COLUMNS": "200"}
    port = free_port()
    running = []
    for process_id in range(num_processes):
      several = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={num_processes}", f"--process_id={process_id}"]
      own = (*self._arguments, *arguments, *(several if num_processes > 1 else ()))
      running.append(commands.Command("himap_jax.run", *own, **environment))
    return running

  def run(self, num_processes, *arguments, **options):
    """Runs to the end; returns what the first process prints and the rows by id."""
    running = self.start(num_processes, *arguments, **options)
    texts = [command.communicate(timeout=300) for command in running]
    assert [command.process.exitcode for command in running] == [0] * num_processes, texts
    assert not any("answered" in text or "mesh:" in errors for text, errors in texts[1:])
    return texts[0], self.rows()

  def rows(self):
    text = self.output.read_text().replace(str(self.output.parent), "")  # errors name the picture's path
    rows = [json.loads(line) for line in text.splitlines()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}

  def files(self):
    names = {path.name for path in self.output.parent.iterdir()}
    return {name for name in names if not name.endswith((".png", "prompts.jsonl"))}

  def write_rows_of_other_settings(self):
    rows = [{"id": i, "answer": "other", "error": None, "digest": f"{'0' * 12}-{'0' * 12}"} for i in (3, 4, "else")]
    self.output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return self.output.read_bytes()


@pytest.fixture(scope="module")
def make_command(checkpoints, loaded, images, tmp_path_factory):
  cache = tmp_path_factory.mktemp("cache")
  directory = loaded("dinov2_shrunk").directory
  return lambda count=COUNT: Command(tmp_path_factory.mktemp("run"), directory, cache, images, count)


@pytest.fixture(scope="module")
def expected(make_command):
  """The rows of one process."""
  _, rows = make_command().run(1, "--batch_size=8", num_devices=1)
  assert len(rows) == COUNT and [i for i, row in rows.items() if row["error"]] == [7]
  return rows


def first(count, rows):
  return {i: row for i, row in rows.items() if i < count}


@pytest.mark.sampled
@pytest.mark.parametrize(
  ("count", "arguments"),
  [(FEW, ("--mesh=data:2,tensor:4", "--batch_size=3", "--prompt_buckets=40")), (COUNT, ("--batch_size=5",))],
)
def test_two_processes_answer_as_one(make_command, expected, count, arguments):
  command = make_command(count)
  (table, errors), rows = command.run(2, *arguments)
  assert rows == first(count, expected)
  assert f"{count - 1} answered, 1 errors, 0 answered before" in table
  assert "mesh: data:" in errors
  assert command.files() == {"output.jsonl", "output.jsonl.settings.json"}
  if count == COUNT:
    (table, _), again = command.run(2, *arguments)
    assert again == rows and f"0 answered, 1 errors, {count - 1} answered before" in table


@pytest.mark.sampled(of="meshes")
def test_tensor_spans_two_processes(make_command, expected):
  _, rows = make_command(FEW).run(2, "--mesh=data:1,tensor:4", "--batch_size=8", "--prompt_buckets=40", num_devices=2)
  assert rows == first(FEW, expected)


def test_a_terminated_process_ends_all_and_other_processes_go_on(make_command, expected):
  """With --noresume, over rows of other settings: these are gone with the first batch, and never come back."""
  command = make_command()
  before = command.write_rows_of_other_settings()
  running = command.start(2, "--mesh=data:8", "--batch_size=8", "--noresume")

  def has_own_rows():
    written = command.output.read_bytes()
    return not written.startswith(before) and written.count(b"\n") >= 8

  running[1].wait_until(has_own_rows)
  running[1].process.terminate()
  _, errors = running[0].communicate(timeout=100)
  assert running[0].process.exitcode == 2
  assert "another process of this run ended" in errors and "Traceback" not in errors
  running[1].communicate()
  assert running[1].process.exitcode == -signal.SIGTERM
  done = {json.loads(line)["id"] for line in command.output.read_text().split("\n")[:-1]}
  assert len(done) < COUNT and {i % 2 for i in done} == {0, 1}  # rows of both processes
  (table, _), rows = command.run(1, "--batch_size=8", num_devices=1)
  assert rows == expected
  assert f"{len(done - {7})} answered before" in table
  assert command.files() == {"output.jsonl", "output.jsonl.settings.json"}


def test_rows_of_other_settings_are_refused_in_every_process(make_command):
  command = make_command()
  before = command.write_rows_of_other_settings()
  running = command.start(2, "--mesh=data:8", "--batch_size=8")
  errors = [process.communicate(timeout=300)[1].splitlines()[-1] for process in running]
  assert [process.process.exitcode for process in running] == [2, 2], errors
  assert "output.jsonl: made with other settings; use another --output, or --noresume to replace it" in errors[0]
  assert "himap_jax: the first process of this run cannot start; its own message says why" in errors[1]
  assert command.output.read_bytes() == before and command.files() == {"output.jsonl"}


class TestFlags:
  @pytest.mark.parametrize(
    ("given", "message"),
    [
      (dict(coordinator="a:1"), "belong together"),
      (dict(coordinator="a:1", num_processes=2), "belong together"),
      (dict(coordinator="a:1", num_processes=2, process_id=0, from_environment=True), "finds the other processes"),
      (dict(coordinator="a:1", num_processes=2, process_id=2), "--process_id must be from 0 to 1, but is 2"),
      (dict(coordinator="a", num_processes=2, process_id=0), "--coordinator=a is not an address with a port"),
    ],
  )
  def test_contradictions(self, given, message):
    values = dict(from_environment=False, coordinator=None, num_processes=None, process_id=None) | given
    with pytest.raises(ValueError, match=message):
      processes.initialize(**values)

  def test_others_that_are_not_found(self, monkeypatch):
    def initialize(*_, **__):
      raise ValueError("coordinator_address should be defined.\nSee below.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(UserError, match=r"processes \(coordinator_address should be defined.\)$"):
      processes.initialize(from_environment=True, coordinator=None, num_processes=None, process_id=None)

  def test_one_process_joins_nobody(self, monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: pytest.fail("joined"))
    processes.initialize(from_environment=False, coordinator=None, num_processes=None, process_id=None)


SLOW_TABLE = """
import functools, pathlib, sys, time
import jax
from himap_jax.engine import processes
from himap_jax.run import table
from himap_jax.run.contract import Contract
from himap_jax.run.output import Output
from himap_jax.run.prompts import Prompt, Prompts
write_table = table.write_table
table.write_table = lambda *paths: (time.sleep(8), write_table(*paths))
jax.distributed.initialize = functools.partial(jax.distributed.initialize, shutdown_timeout_seconds=5)
place = {"coordinator": sys.argv[1], "num_processes": 2, "process_id": int(sys.argv[2])}
processes.initialize(from_environment=False, **place)
with Output(Contract(pathlib.Path(sys.argv[3]), {}, Prompts.of([Prompt(1)])), resume=True) as output:
  output.write([{"id": 1, "answer": "yes", "error": None, "digest": "a-b-c"}])
"""


def test_a_table_may_take_longer_than_jax_waits_at_exit(tmp_path):
  address, path = f"127.0.0.1:{free_port()}", tmp_path / "output.parquet"
  running = [commands.Command(SLOW_TABLE, address, number, path) for number in range(2)]
  for command in running:
    command.succeeded()
  assert parquet.read_table(path)["id"].to_pylist() == [1]


@dataclasses.dataclass(frozen=True)
class Device:
  """What a mesh and a share read of a device."""

  id: int
  process_index: int
  device_kind: str = "none"
  platform: str = "cpu"


def mesh_of(process_ids):
  devices = [Device(number, process) for number, process in enumerate(np.ravel(process_ids).tolist())]
  return jax.sharding.Mesh(np.array(devices).reshape(np.shape(process_ids)), ("data", "tensor"))


LEAVING = """
import sys, time
from himap_jax.engine import processes
processes.LEAVING_SECONDS = 1
place = {"coordinator": sys.argv[1], "num_processes": 2, "process_id": int(sys.argv[2])}
processes.initialize(from_environment=False, **place)
print("joined", flush=True)
time.sleep(0 if sys.argv[2] == sys.argv[3] else 600)
processes.leave(2)
"""


class TestEnds:
  @pytest.mark.parametrize("leaving", [0, 1])
  def test_a_process_that_fails_does_not_wait_for_the_others(self, leaving):
    address = f"127.0.0.1:{free_port()}"
    running = [commands.Command(LEAVING, address, number, leaving) for number in range(2)]
    running[1 - leaving].wait_until(lambda: "joined" in running[1 - leaving].text()[0])
    running[leaving].communicate(timeout=60)
    running[1 - leaving].process.kill()
    running[1 - leaving].process.join()
    assert running[leaving].process.exitcode == 2

  @pytest.mark.parametrize(
    ("error", "count", "is_lost"),
    [
      (jax.errors.JaxRuntimeError("INTERNAL: Gloo"), 2, True),
      (ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"), 2, True),
      (jax.errors.JaxRuntimeError("INTERNAL: Gloo"), 1, False),
      (UserError("the output: UNKNOWN: no"), 2, False),
      (ValueError("shapes differ"), 2, False),
    ],
  )
  def test_errors_of_processes_that_are_lost(self, monkeypatch, error, count, is_lost):
    monkeypatch.setattr(jax, "process_count", lambda: count)
    assert processes.is_lost(error) == is_lost


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
    assert processes.share(mesh_of(process_ids)) == share

  def test_one_of_two_processes_with_the_same_rows_writes(self, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert processes.share(mesh_of([[0, 1], [2, 3]])) == Share(0, 2, False)

  def test_rows_that_overlap_in_part(self):
    with pytest.raises(ValueError, match="overlap in part"):
      processes.share(mesh_of([[0, 1], [1, 0], [0, 0]]))


class TestEqual:
  """What processes must have in common."""

  @pytest.mark.parametrize(
    ("texts", "groups", "all_equal", "equal_in_groups"),
    [
      ("aa", (0, 1), True, True),
      ("ab", (0, 1), False, True),
      ("abab", (0, 1, 0, 1), False, True),
      ("abaa", (0, 1, 0, 1), False, False),
    ],
  )
  def test_in_all_and_in_groups(self, monkeypatch, texts, groups, all_equal, equal_in_groups):
    monkeypatch.setattr(jax, "process_count", lambda: len(texts))
    own = [np.array([group, zlib.crc32(text.encode())], np.uint32) for text, group in zip(texts, groups, strict=True)]

    def gather(array):
      assert array.tolist() == [own[0][0] if by_group else 0, own[0][1]]
      return np.stack([[array[0] if not by_group else group, code] for group, code in own])

    monkeypatch.setattr(processes.multihost_utils, "process_allgather", gather)
    by_group = False
    assert processes.is_equal(texts[0]) == all_equal
    by_group = True
    assert processes.is_equal(texts[0], Share(groups[0], 2)) == equal_in_groups

  def test_rows_of_processes_that_share_them(self, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "is_equal", lambda text, share: text == "a b")
    answering._check_equal(["a", "b"], Share(0, 1))
    answering._check_equal(["a", "c"], Share(0, 2))
    with pytest.raises(UserError, match="have read different prompts or pictures"):
      answering._check_equal(["a", "c"], Share(0, 1))


class TestResults:
  """The results of all processes, collected in each."""

  def test_of_two_processes(self, monkeypatch):
    own = [Result({"id": 1, "answer": "é\u2028", "first_logits": [0.1, -1e-9]}, 2, 1, 16, 5, [8, 3])]
    others = [[], own * 40]
    sent = []

    def gather(array):
      sent.append(array)
      data = json.dumps(others[-1]).encode()
      if len(sent) % 2:
        return np.array([array, [len(data)]])
      assert len(array) & (len(array) - 1) == 0
      return np.stack([array, np.frombuffer(data.ljust(len(array)), np.uint8)])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(answering.multihost_utils, "process_allgather", gather)
    assert answering._gather_results(own) == [*own, *own * 40]
    others.append([])
    assert answering._gather_results([]) == []
    assert answering._gather_results(own) == own

  def test_of_one(self):
    assert answering._gather_results([Result({})]) == [Result({})]
