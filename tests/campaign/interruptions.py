"""Runs that are interrupted at any moment and started again with something changed."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

import commands
import numpy as np
from campaign import jobs
from campaign.jobs import NUM_PICTURES, NUM_ROWS, Job, State
from campaign.trials import Part

PAGE_BYTES, OUTPUT_BYTES = 4096, 9000  # the unit of a tmpfs, and about the size of a whole output
SECONDS = 150  # for the end of a run whose other process was killed: it notices after JAX's heartbeats
MOUNTED = "full disk"


@dataclasses.dataclass(frozen=True)
class Interruption:
  """What happens to a running job.

  Attributes:
    act: at the moment of the interruption.
    codes: exit codes of processes that it ends.
    message: of exit code 2 a pattern.
    before: prepares the directory, before the run.
    undo: makes the directory as it was, before the restart.
    options: of `Job.start`.
  """

  act: Callable[[Job, list[commands.Command], np.random.Generator], None]
  codes: tuple[int, ...]
  message: str = "$"
  before: Callable[[Job, np.random.Generator], None] = lambda job, random: None
  undo: Callable[[Job], None] = lambda job: None
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _sends(number: int, *, to_one_of_two: bool = False) -> Callable[..., None]:
  def act(job: Job, running: list[commands.Command], random: np.random.Generator) -> None:
    command = running[int(random.integers(2))] if to_one_of_two else running[0]
    with contextlib.suppress(ProcessLookupError):
      os.kill(command.process.pid, number)

  return act


def _limit_files(job: Job, running: list[commands.Command], random: np.random.Generator) -> None:
  limit = int(random.integers(1000, OUTPUT_BYTES))  # its messages fit
  with contextlib.suppress(ProcessLookupError):
    resource.prlimit(running[0].process.pid, resource.RLIMIT_FSIZE, (limit, limit))


def _protect(job: Job, *_: Any) -> None:
  for path in job.output.parent.iterdir():
    with contextlib.suppress(FileNotFoundError):
      path.chmod(0o400)
  job.output.parent.chmod(0o500)


def _unprotect(job: Job) -> None:
  job.output.parent.chmod(0o700)
  for path in job.output.parent.iterdir():
    path.chmod(0o600)


def _mount(job: Job, random: np.random.Generator) -> None:
  """Puts the output on a disk that holds a part of it, with its rows of other settings if there are any."""
  before = {path.name: path.read_bytes() for path in job.output.parent.iterdir()}
  size = sum(-(-len(content) // PAGE_BYTES) for content in before.values()) + int(random.integers(0, 4))
  _run("mount", "-t", "tmpfs", "-o", f"size={max(size, 1) * PAGE_BYTES}", "tmpfs", str(job.output.parent))
  for name, content in before.items():
    (job.output.parent / name).write_bytes(content)


def _enlarge(job: Job) -> None:
  _run("mount", "-o", "remount,size=16m", str(job.output.parent))


def _run(*command: str) -> None:
  subprocess.run(command, check=True, capture_output=True)


# How JAX ends a process whose other process ended while it was not waiting for it. The fault handler that absl switches
# on then prints the stacks of all threads, some of which still run, and may crash while doing so.
ABORTED = (-signal.SIGABRT, -signal.SIGSEGV)
OTHER = (2, *ABORTED)  # of a process whose other process ended
TWO = {"message": "another process of this run ended|cannot join|cannot write", "options": {"num_processes": 2}}
UNWRITABLE = {"codes": (2,), "message": "cannot (write|use)"}
INTERRUPTIONS = {
  "SIGKILL": Interruption(_sends(signal.SIGKILL), (-signal.SIGKILL,)),
  "SIGTERM": Interruption(_sends(signal.SIGTERM), (-signal.SIGTERM,)),
  "SIGINT": Interruption(_sends(signal.SIGINT), (130, -signal.SIGINT)),
  "SIGKILL to one of two": Interruption(_sends(signal.SIGKILL, to_one_of_two=True), (-signal.SIGKILL, *OTHER), **TWO),
  "SIGTERM to one of two": Interruption(_sends(signal.SIGTERM, to_one_of_two=True), (-signal.SIGTERM, *OTHER), **TWO),
  "SIGINT to one of two": Interruption(_sends(signal.SIGINT, to_one_of_two=True), (130, *OTHER), **TWO),
  "file size limit of two": Interruption(_limit_files, OTHER, **TWO),
  "file size limit": Interruption(_limit_files, **UNWRITABLE),
  "read-only output": Interruption(_protect, undo=_unprotect, options={"code": jobs.UNPRIVILEGED}, **UNWRITABLE),
  MOUNTED: Interruption(lambda *_: None, before=_mount, undo=_enlarge, **UNWRITABLE),
  "pictures away": Interruption(
    lambda job, *_: job.images.rename(job.images.with_name("away")),
    codes=(2, 1),  # 1 if no row could be answered
    message="no such directory",
    undo=lambda job: job.images.with_name("away").rename(job.images),
  ),
}


# What is changed before the restart: the arguments of the restart, after the change of the job's files.
Change = Callable[[Job, np.random.Generator], Mapping[str, Any]]


def _changes_state(change: Callable[[State, np.random.Generator], State], *arguments: str) -> Change:
  def act(job: Job, random: np.random.Generator) -> Mapping[str, Any]:
    job.change(change(job.state, random))
    return {"arguments": arguments}

  return act


def _flip(random: np.random.Generator, count: int) -> tuple[int, ...]:
  """Variants, of which about half have changed."""
  return tuple(random.integers(0, 2, count).tolist())


def _other_method(state: State, random: np.random.Generator) -> State:
  return dataclasses.replace(state, method="none")


def _other_weights(state: State, random: np.random.Generator) -> State:
  return dataclasses.replace(state, weights="second")


CHANGES: dict[str, Change] = {
  "same": lambda job, random: {},
  "--noresume": lambda job, random: {"arguments": ("--noresume",)},
  "other method": _changes_state(_other_method),
  "other method, --noresume": _changes_state(_other_method, "--noresume"),
  "other weights": _changes_state(_other_weights),
  "other weights, --noresume": _changes_state(_other_weights, "--noresume"),
  "other questions": _changes_state(
    lambda state, random: dataclasses.replace(state, questions=_flip(random, NUM_ROWS))
  ),
  "other pictures": _changes_state(
    lambda state, random: dataclasses.replace(state, pictures=_flip(random, NUM_PICTURES))
  ),
  "two processes": lambda job, random: {"num_processes": 2},
  "more devices": lambda job, random: {"num_devices": int(random.integers(2, 5))},
  "other batch size": lambda job, random: {"arguments": (f"--batch_size={random.choice([1, 3, 8])}",)},
}


@dataclasses.dataclass(frozen=True)
class Moment:
  """When a run is interrupted: after so many lines or, without them, after so many seconds."""

  lines: int | None
  seconds: float

  @classmethod
  def draw(cls, random: np.random.Generator, seconds: float) -> "Moment":
    lines, time_after = int(random.integers(1, NUM_ROWS)), random.uniform(0.02, seconds)
    return cls(lines if random.random() < 0.5 else None, time_after)

  def wait(self, job: Job, running: list[commands.Command]) -> None:
    """Waits for the moment or for the end of the run; processes are first left to find each other."""
    if len(running) > 1:
      running[0].wait_until(lambda: "mesh:" in running[0].text()[1])
    start = time.monotonic()
    while running[0].process.is_alive():
      if not running[0].has_begun():
        start = time.monotonic()
      elif time.monotonic() - start >= self.seconds if self.lines is None else job.num_answered() >= self.lines:
        return
      time.sleep(0.001)


def prepare(shared: pathlib.Path) -> Callable[[np.random.Generator, pathlib.Path], dict[str, int]]:
  names = [name for name in INTERRUPTIONS if name != MOUNTED or jobs.can_mount()]

  @functools.cache
  def made(subject: str) -> tuple[jobs.World, float]:
    """The world of a subject, and the seconds of a run."""
    world = jobs.World(shared / subject.replace(" ", "_"), jobs.SUBJECTS[subject])
    return world, jobs.seconds_of_a_run(world, shared / "timed")

  def trial(random: np.random.Generator, directory: pathlib.Path) -> dict[str, int]:
    name, change = str(random.choice(names)), str(random.choice(list(CHANGES)))
    subject = str(random.choice(list(jobs.SUBJECTS), p=[0.7, 0.3]))
    form = jobs.Form(*(bool(share < 0.3) for share in random.random(2)))
    world, seconds = made(subject)
    moment = Moment.draw(random, seconds)
    is_over_others = random.random() < 0.3 and not form.has_pictures  # of which the rows in place have none
    job = Job(world, directory, form=form)
    if is_over_others:
      job.write_rows(State(method="none"))
    with contextlib.ExitStack() as stack:
      if name == MOUNTED:
        stack.callback(subprocess.run, ["umount", str(job.output.parent)], check=False)
      arguments = ("--noresume",) if is_over_others else ()
      is_interrupted = _interrupt(job, INTERRUPTIONS[name], moment, random, arguments)
      what = _restart(job, CHANGES[change](job, random))
    how = f"interrupted by {name}" if is_interrupted else "not interrupted"
    forms = [name for name, is_so in zip(("parquet", "--pictures"), form, strict=True) if is_so]
    return {f"{of}: {what}": 1 for of in (how, f"then {change}", f"of {subject}", *(f"with {form}" for form in forms))}

  return trial


def _interrupt(
  job: Job, own: Interruption, moment: Moment, random: np.random.Generator, arguments: tuple[str, ...]
) -> bool:
  """Runs the job and interrupts it; returns whether that had an effect."""
  own.before(job, random)
  running = job.start(*arguments, **own.options)
  moment.wait(job, running)
  own.act(job, running, random)
  is_complete = job.num_answered() == NUM_ROWS
  texts = [command.communicate(timeout=SECONDS) for command in running]
  codes = [command.process.exitcode for command in running]
  own.undo(job)
  assert set(codes) <= {0, *own.codes}, (codes, texts)
  for command, code in zip(running, codes, strict=True):
    assert code != 2 or re.search(own.message, jobs.last_line(command)), texts
    assert "this is a bug" not in command.text()[1], texts
    assert code not in ABORTED or "JAX distributed service detected fatal errors" in command.text()[1], texts
  if own.codes[0] != 2 and not any(codes):
    assert is_complete, ("a signal that was swallowed", texts)
  return any(codes) or not job.is_right()


def _restart(job: Job, changed: Mapping[str, Any]) -> str:
  """Starts the job again; returns `complete`, or `refused` where it must be; it is then complete with --noresume."""
  options = dict(changed)
  arguments = options.pop("arguments", ())
  must_be_refused = "--noresume" not in arguments and job.has_other_answers()
  if not must_be_refused:
    job.run(*arguments, **options)
    job.check()
    return "complete"
  before = job.files()
  (command,) = job.start(*arguments, **options) if "num_processes" not in options else job.start(*arguments)
  assert f"{job.output.name}: made with other settings" in jobs.last_line(command), command.text()
  changed = before.items() ^ job.files().items()
  assert command.process.exitcode == 2 and not changed, changed
  job.run(*arguments, "--noresume", **options)
  job.check()
  return "refused"


PART = Part(
  "After an interruption and a restart every answer is there once and is that of the present inputs.", prepare
)
