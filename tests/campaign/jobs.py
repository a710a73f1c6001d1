"""A small job of the real command, and the rows that it must write whatever happened before."""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import shutil
import socket
import subprocess
import tempfile
import time
from typing import NamedTuple

import commands
import numpy as np
import tiny_checkpoints
from checkpoints import layouts
from PIL import Image

NUM_ROWS, NUM_PICTURES, MISSING = 32, 4, 7  # rows, pictures, and the row whose picture is missing
ARGUMENTS = ("--max_new_tokens=8", "--ignore_eos", "--dtype=float32", "--emit=tokens,kept")
OF_IMPORTS = {  # read by modules that commands import only once
  "JAX_PLATFORMS": "cpu",
  "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
  "HF_HUB_OFFLINE": "1",
  "TRANSFORMERS_OFFLINE": "1",
  "TOKENIZERS_PARALLELISM": "false",
}
UNPRIVILEGED = """
import ctypes, runpy
assert ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()) == 0
runpy.run_module("himap_jax.run", run_name="__main__", alter_sys=True)
"""  # so that permissions hold for root, too


@dataclasses.dataclass(frozen=True)
class Subject:
  """A tiny model that answers.

  Attributes:
    family: of `models`.
    himap: layers and counts of HiMAP.
    arguments: flags of its own.
    step: pixels by which each picture is larger than the one before.
  """

  family: str
  himap: tuple[str, str]
  arguments: tuple[str, ...] = ()
  step: int = 1

  def method(self, name: str) -> tuple[str, ...]:
    return (f"--method={name}", *(self.himap if name == "himap" else ()))


SUBJECTS = {
  "one size": Subject(
    "llava", ("--prune_layers=2,4", "--keep=8,3"), ("--prompt_buckets=40", "--prompt_template=<image>{question}")
  ),
  "pictures of any size": Subject("qwen2_5_vl", ("--prune_layers=1,3", "--keep=50%,20%"), step=8),
}


class Form(NamedTuple):
  """What a run writes: parquet or JSONL, and a picture of each row or none."""

  is_table: bool = False
  has_pictures: bool = False


@dataclasses.dataclass(frozen=True)
class State:
  """What answers depend on; variants of questions and pictures are 0 or 1.

  Attributes:
    weights: `first`, `second`, or `original` for the first in LLaVA's original layout.
    questions: a variant for each row.
    pictures: a variant for each picture file.
  """

  method: str = "himap"
  weights: str = "first"
  questions: tuple[int, ...] = (0,) * NUM_ROWS
  pictures: tuple[int, ...] = (0,) * NUM_PICTURES


class World:
  """What all trials share: checkpoints, pictures, a cache folder, and the rows of uninterrupted runs."""

  def __init__(self, shared: pathlib.Path, subject: Subject = SUBJECTS["one size"]):
    os.environ.update(OF_IMPORTS)
    shared.mkdir(parents=True, exist_ok=True)
    self.cache, self.subject, self._shared = shared / "cache", subject, shared
    self._rows: dict[tuple[str, str], dict[str, dict]] = {}
    for index, variant in itertools.product(range(NUM_PICTURES), (0, 1)):
      picture = tiny_checkpoints.noise_image((40 + subject.step * index, 37), seed=10 * variant + index)
      picture.save(self.picture(index, variant))

  def picture(self, index: int, variant: int) -> pathlib.Path:
    return self._shared / f"{index}_{variant}.png"

  def checkpoint(self, name: str) -> pathlib.Path:
    """The directory of a checkpoint, made once."""
    directory = self._shared / name
    if not directory.exists():
      work = directory.with_name(f"{name}.partial")
      shutil.rmtree(work, ignore_errors=True)
      if name == "first":
        from campaign import models  # with every family's module of transformers

        work.mkdir()
        models.MAKERS[self.subject.family](work)
      elif name == "second":
        layouts.copy_of(self.checkpoint("first"), work, change=_with_other_head)
      else:
        layouts.make_original(self.checkpoint("first"), work, tower_inside=True)
      work.rename(directory)
    return directory

  def expected(self, state: State) -> dict[int, dict]:
    """The rows of an uninterrupted run, by id."""
    rows = self._uninterrupted(state.method, state.weights)
    return {i: rows[_variant(state, i)] | {"id": i} for i in range(NUM_ROWS)}

  def drawn(self, state: State, row: int) -> pathlib.Path:
    """The picture of a row that an uninterrupted run writes."""
    self._uninterrupted(state.method, state.weights)
    folder = self._shared / f"expected_{state.method}_{state.weights}" / "drawn"
    return folder / f"{_variant(state, row)}.png"

  def settings_digest(self, state: State) -> str:
    return self.expected(state)[0]["digest"].split("-")[0]

  def _uninterrupted(self, method: str, weights: str) -> dict[str, dict]:
    """Rows of every variant, by row and variants; of one run, which is made once."""
    if (method, weights) not in self._rows:
      directory = self._shared / f"expected_{method}_{weights}"
      job = Job(self, directory, State(method, weights), Form(has_pictures=True))
      if not (directory / "done").exists():
        variants = itertools.product(range(NUM_ROWS), (0, 1), (0, 1))
        job.write_prompts([(f"{i}-{q}-{p}", i, q, f"{i % NUM_PICTURES}_{p}.png") for i, q, p in variants])
        for index, variant in itertools.product(range(NUM_PICTURES), (0, 1)):
          shutil.copy(self.picture(index, variant), job.images)
        job.run("--batch_size=8", "--noresume")
        (directory / "done").touch()
      self._rows[method, weights] = job.rows()
      assert len(self._rows[method, weights]) == 4 * NUM_ROWS
    return self._rows[method, weights]


class Job:
  """A run in a directory of its own, which it writes.

  Attributes:
    state: what the files in the directory are and the command says, now.
    images: the directory of the pictures.
    output: the output; in another directory than the inputs.
  """

  def __init__(self, world: World, directory: pathlib.Path, state: State = State(), form: Form = Form()):
    self.state, self._world, self._directory, self._form = state, world, directory, form
    self.images, self._drawn = directory / "images", directory / "drawn"
    self.output = directory / "output" / ("rows.parquet" if form.is_table else "rows.jsonl")
    self.images.mkdir(parents=True, exist_ok=True)
    self.output.parent.mkdir(exist_ok=True)
    self.change(state)

  def change(self, state: State) -> None:
    """Writes the inputs of a state."""
    self.state = state
    self.write_prompts([(i, i, state.questions[i], f"{i % NUM_PICTURES}.png") for i in range(NUM_ROWS)])
    for index, variant in enumerate(state.pictures):
      shutil.copy(self._world.picture(index, variant), self.images / f"{index}.png")
    checkpoint = self._directory / "checkpoint"
    shutil.rmtree(checkpoint, ignore_errors=True)
    shutil.copytree(self._world.checkpoint(state.weights), checkpoint)

  def write_prompts(self, rows: list[tuple[int | str, int, int, str]]) -> None:
    """Writes prompts of an id, a row's number, the variant of its question, and a picture's name."""
    lines = [
      json.dumps(
        {
          "id": row_id,
          "image": "missing.png" if number == MISSING else picture,
          "question": f"Why is number {number} here?" if variant else f"Is {number} one?",
        }
      )
      for row_id, number, variant, picture in rows
    ]
    (self._directory / "prompts.jsonl").write_text("\n".join(lines))

  def start(
    self, *arguments: str, num_processes: int = 1, num_devices: int = 1, code: str = "himap_jax.run", **environment: str
  ) -> list[commands.Command]:
    """Starts the command in one process or several; `code` may stand for its module."""
    given = [
      f"--checkpoint={self._directory / 'checkpoint'}",
      f"--prompts={self._directory / 'prompts.jsonl'}",
      f"--image_dir={self.images}",
      f"--output={self.output}",
      f"--compilation_cache_dir={self._world.cache / 'compiled'}",
      *self._world.subject.method(self.state.method),
      *self._world.subject.arguments,
      *ARGUMENTS,
      *([f"--pictures={self._drawn}"] if self._form.has_pictures else ()),
      *arguments,
    ]
    if not any(argument.startswith("--batch_size") for argument in arguments):
      given.append(f"--batch_size={2 * num_processes * num_devices}")
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={num_devices}"
    environment = {"HIMAP_JAX_CACHE": str(self._world.cache), "XLA_FLAGS": flags, "COLUMNS": "200"} | environment
    several, port = [f"--num_processes={num_processes}"], _free_port()
    return [
      commands.Command(
        code,
        *given,
        *([f"--coordinator=127.0.0.1:{port}", *several, f"--process_id={i}"] if num_processes > 1 else ()),
        **environment,
      )
      for i in range(num_processes)
    ]

  def run(self, *arguments: str, **options: object) -> None:
    """Runs to the end, without an error."""
    running = self.start(*arguments, **options)
    texts = [command.communicate() for command in running]
    assert [command.process.exitcode for command in running] == [0] * len(running), texts

  def check(self) -> None:
    """The output holds the rows of an uninterrupted run of the present state, each once, and there are its pictures."""
    rows, expected = self.rows(), self._world.expected(self.state)
    assert rows.keys() == expected.keys(), rows.keys()
    for row_id, row in rows.items():
      assert _without_names(row) == _without_names(expected[row_id]), (row, expected[row_id])
      if self._form.has_pictures and row["error"] is None:
        own, wanted = map(_content, (self._drawn / f"{row_id}.png", self._world.drawn(self.state, row_id)))
        assert own == wanted, row
    assert not self._form.is_table or not self._lines.exists()

  def is_right(self) -> bool:
    rows, expected = self.rows(), self._world.expected(self.state)
    return rows.keys() == expected.keys() and all(
      _without_names(row) == _without_names(expected[row_id]) for row_id, row in rows.items()
    )

  def rows(self) -> dict[int | str, dict]:
    """The rows of the output by their ids."""
    found = list(_table(self.output)) if self._form.is_table else _whole_rows(self.output.read_text())
    assert self._form.is_table or self.output.read_text().endswith("\n")
    assert len({str(row["id"]) for row in found}) == len(found), found
    for row in found:  # an error names the picture's path
      row["error"] = row["error"] and row["error"].replace(str(self.images), "")
    return {row["id"]: row for row in found}

  def write_rows(self, state: State) -> None:
    """Puts in place the output of an uninterrupted run of another state."""
    rows = list(self._world.expected(state).values())
    if self._form.is_table:
      import pyarrow as pa
      from pyarrow import parquet

      parquet.write_table(pa.Table.from_pylist(rows), self.output)
    else:
      self.output.write_text("".join(json.dumps(row) + "\n" for row in rows))

  def num_answered(self) -> int:
    """Rows of the output so far that have the present settings."""
    own = self._world.settings_digest(self.state)
    return sum(row["digest"].startswith(f"{own}-") for row in self._so_far())

  def has_other_answers(self) -> bool:
    """Whether the output holds an answer of other settings."""
    own = self._world.settings_digest(self.state)
    return any(row["error"] is None and not row["digest"].startswith(own) for row in self._so_far())

  @property
  def _lines(self) -> pathlib.Path:
    """The file to which a run appends."""
    return self.output.with_name(f"{self.output.name}.jsonl") if self._form.is_table else self.output

  def _so_far(self) -> list[dict]:
    """The whole rows of an output that a run may be writing; of a table those that it would continue."""
    for _ in range(2):  # a table takes the place of its lines in the meantime
      with contextlib.suppress(FileNotFoundError):
        text = self._lines.read_text(errors="replace")
        if text or not self._form.is_table:
          return _whole_rows(text)
      if self._form.is_table and self.output.exists():
        return _table(self.output)
    return []

  def files(self) -> dict[str, bytes]:
    """The output and all that is beside it, but for empty files, as a killed run may leave them."""
    files = {path.name: path.read_bytes() for path in self.output.parent.iterdir()}
    return {name: content for name, content in files.items() if content}


def seconds_of_a_run(world: World, directory: pathlib.Path) -> float:
  """How long an uninterrupted run takes once its programs are compiled."""
  for _ in range(2):
    job = Job(world, directory)
    start = time.monotonic()
    job.run("--noresume")
  return time.monotonic() - start


def last_line(command: commands.Command) -> str:
  """The last line on standard error of a command, once it has ended; there is no traceback."""
  errors = command.communicate()[1].strip()
  assert "Traceback" not in errors and "Exception ignored" not in errors, errors
  return errors.splitlines()[-1] if errors else ""


def can_mount() -> bool:
  """Whether this process may mount a tmpfs."""
  with tempfile.TemporaryDirectory() as directory:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", directory], capture_output=True).returncode == 0
    if mounted:
      subprocess.run(["umount", directory], check=True)
  return mounted


def _whole_rows(text: str) -> list[dict]:
  return [json.loads(line) for line in text.split("\n")[:-1]]


def _without_names(row: dict) -> dict:
  """The row, its digest without that of the names of its pictures, which uninterrupted runs call otherwise."""
  return row | {"digest": row["digest"].rpartition("-")[0]}


def _content(path: pathlib.Path) -> tuple[bytes, str]:
  """What a run has drawn, and of which row."""
  with Image.open(path) as picture:
    return picture.tobytes(), picture.info["digest"].rpartition("-")[0]


def _table(path: pathlib.Path) -> list[dict]:
  """The rows of a parquet file, without the fields that a row does not have."""
  from pyarrow import parquet

  optional = ("token_ids", "kept")
  rows = parquet.read_table(path).to_pylist()
  return [{name: value for name, value in row.items() if value is not None or name not in optional} for row in rows]


def _variant(state: State, row: int) -> str:
  """The id of a row with the variants of a state, in uninterrupted runs of all variants."""
  return f"{row}-{state.questions[row]}-{state.pictures[row % NUM_PICTURES]}"


def _with_other_head(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Other weights in files of the same sizes."""
  return {name: -value if name.endswith("lm_head.weight") else value for name, value in tensors.items()}


def _free_port() -> int:
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    return listener.getsockname()[1]
