"""Several runs, users and versions on one output, one cache and one machine; caches and homes that cannot be used.

Other users need root, and keep its right to read, so that they can import what only root may read; what they would not
be allowed to read of a shared cache is checked by its modes.
"""

import json
import os
import pathlib
import shutil
import stat
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence

import commands
import numpy as np
from campaign import jobs
from campaign.jobs import Job, State, World
from campaign.trials import Part

from checkpoints_convert.demo import packages

USERS, GROUP, NOBODY = (12001, 12002), 12000, 12003  # without an entry in the list of users
AS_USER = """
import ctypes, os, runpy, sys
libc = ctypes.CDLL(None)
user, group = int(os.environ["AS_USER"]), int(os.environ["AS_GROUP"])
assert libc.prctl(8, 1, 0, 0, 0) == 0
os.setgroups([])
os.setresgid(group, group, group)
os.setresuid(user, user, user)
readable = (ctypes.c_uint32 * 6)(1 << 2, 1 << 2, 0, 0, 0, 0)
assert libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), readable) == 0
os.umask(0o002)
runpy.run_module("himap_jax.run", run_name="__main__", alter_sys=True)
"""
FETCH = """
import pathlib, sys
from checkpoints_convert.demo import packages
folder = packages.fetch(pathlib.Path(sys.argv[1]), requirements=pathlib.Path(sys.argv[2]))
assert (folder / "tiny/data.txt").read_text() == "seven"
"""


def _ended(running: Sequence[commands.Command]) -> list[int]:
  """Exit codes, once all have ended: 0, or 2 with one line that says why."""
  codes = []
  for command in running:
    line = jobs.last_line(command)
    codes.append(command.process.exitcode)
    assert codes[-1] == 0 or (codes[-1] == 2 and line.startswith("himap_jax: ")), command.text()
  return codes


def two_runs_on_one_output(world: World, seconds: float, random: np.random.Generator, directory: pathlib.Path) -> str:
  """The second may have another method, or replace what the first writes."""
  job, other = Job(world, directory), bool(random.random() < 0.5)
  arguments = ("--noresume",) if random.random() < 0.5 else ()
  (first,) = job.start(*arguments)
  time.sleep(random.uniform(0, seconds))
  states = [job.state, State("none") if other else job.state]
  job.state = states[1]
  (second,) = job.start(*arguments)
  codes = _ended([first, second])
  assert 0 in codes
  for command, code in zip((first, second), codes, strict=True):
    assert (
      code == 0 or "another run is writing" in jobs.last_line(command) or "other settings" in jobs.last_line(command)
    )
  job.state = states[job.has_other_answers()]
  job.state = states[0] if codes[1] else states[1] if codes[0] or arguments else job.state
  job.check()
  return "one refused" if 2 in codes else "one after the other"


def two_first_uses(world: World, seconds: float, random: np.random.Generator, directory: pathlib.Path) -> str:
  """Of an empty cache, into which a checkpoint is converted; one may be killed."""
  pair = [Job(world, directory / str(number), State(weights="original")) for number in range(2)]
  cache = directory / "cache"
  checkpoint = f"--checkpoint={world.checkpoint('original')}"
  kills = bool(random.random() < 0.5)
  running = [command for job in pair for command in job.start(checkpoint, HIMAP_JAX_CACHE=str(cache))]
  if kills:
    running[0].wait_until(running[0].has_begun)
    running[0].process.join(random.uniform(0, seconds))
    running[0].process.kill()
  assert _ended(running[kills:]) == [0] * (2 - kills)
  for job in pair[kills:]:
    job.check()
  pair[0].run(checkpoint, HIMAP_JAX_CACHE=str(cache))
  pair[0].check()
  assert len(list((cache / "converted").iterdir())) == 1, list((cache / "converted").iterdir())
  return "right beside a killed one" if kills else "both right"


def damaged_cache(world: World, seconds: float, random: np.random.Generator, directory: pathlib.Path) -> str:
  """Programs or digests that a crash of the machine has cut or emptied, or digests in another form."""
  cache = directory / "cache"
  job = Job(world, directory)
  shutil.copytree(world.cache / "compiled", cache / "compiled")
  arguments, environment = (f"--compilation_cache_dir={cache / 'compiled'}",), {"HIMAP_JAX_CACHE": str(cache)}
  job.run(*arguments, **environment)
  kind = str(random.choice(["programs", "digests", "digests in another form"]))
  for path in (cache / ("compiled" if kind == "programs" else "digests")).iterdir():
    if kind == "digests in another form":
      content = json.loads(path.read_text())
      other = [{name: form for name in content} for form in (3, None, {}, [], "abc", [[]])]
      path.write_text(json.dumps(other[int(random.integers(len(other)))]))
    elif random.random() < 0.7:
      os.truncate(path, int(random.integers(path.stat().st_size + 1)))
  job.run("--noresume", *arguments, **environment)
  job.check()
  return f"{kind}: right"


def older_version(world: World, seconds: float, random: np.random.Generator, directory: pathlib.Path) -> str:
  """A converted copy whose marker an older version has written, or a newer one."""
  cache, job = directory / "cache", Job(world, directory, State(weights="original"))
  job.run(HIMAP_JAX_CACHE=str(cache))
  ((copy,), fields) = list((cache / "converted").iterdir()), {"format": int(random.choice([0, 2]))}
  marker = copy / "himap_jax.json"
  marker.write_text(json.dumps(json.loads(marker.read_text()) | fields))
  (command,) = job.start("--noresume", HIMAP_JAX_CACHE=str(cache))
  refused = _ended([command]) == [2]
  if refused:
    assert str(copy) in jobs.last_line(command)
    shutil.rmtree(copy)
    job.run("--noresume", HIMAP_JAX_CACHE=str(cache))
  job.check()
  return "one line that names the folder" if refused else "right"


def no_home(world: World, seconds: float, random: np.random.Generator, directory: pathlib.Path) -> str:
  """A home that is read-only, absent or unset, without any other folder for a cache."""
  weights = str(random.choice(["first", "original"]))
  kind = str(random.choice(["read-only", "absent", "unset", *(["of no user"] if os.geteuid() == 0 else [])]))
  job, home = Job(world, directory, State(weights=weights)), directory / "home"
  home.mkdir(mode=0o500)
  given = {"HOME": "/nonexistent" if kind == "absent" else str(home), "TMPDIR": str(directory)}
  without, code = ["HIMAP_JAX_CACHE", "XDG_CACHE_HOME"], jobs.UNPRIVILEGED
  if kind == "of no user":
    code, given = AS_USER, given | {"AS_USER": str(NOBODY), "AS_GROUP": str(NOBODY)}
    _hand_over(directory, NOBODY, NOBODY)
  if kind in ("unset", "of no user"):
    without.append("HOME")
  (command,) = job.start(code=_without(without, code), **given)
  refused = _ended([command]) == [2]
  if refused:
    assert weights == "original" or "HIMAP_JAX_CACHE" in jobs.last_line(command), command.text()
  else:
    job.check()
  return f"{kind}, {'converted' if weights == 'original' else 'as published'}: {'one line' if refused else 'right'}"


def two_users(world: World, seconds: float, random: np.random.Generator, directory: pathlib.Path) -> str:
  """One after the other or at once, in one group, with one cache and one folder for temporary files."""
  cache, temporary = directory / "cache", directory / "temporary"
  pair = [Job(world, directory / str(number), State(weights="original")) for number in range(2)]
  checkpoint = f"--checkpoint={world.checkpoint('original')}"
  for shared in (cache, temporary):
    shared.mkdir()
    os.chown(shared, USERS[0], GROUP)
  cache.chmod(0o2775)
  temporary.chmod(0o1777)
  at_once, running = bool(random.random() < 0.5), []
  for job, user in zip(pair, USERS, strict=True):
    _hand_over(job.output.parent, user, GROUP)
    environment = {"HIMAP_JAX_CACHE": str(cache), "TMPDIR": str(temporary), "HOME": "/nonexistent"}
    own = f"--compilation_cache_dir={cache / 'compiled'}"
    options = {"code": AS_USER, "AS_USER": str(user), "AS_GROUP": str(GROUP)} | environment
    running += job.start(checkpoint, own, **options)
    if not at_once:
      running[-1].communicate()
  assert _ended(running) == [0, 0]
  for job in pair:
    job.check()
  for path in cache.rglob("*"):
    mode = path.stat().st_mode
    assert mode & (stat.S_IRGRP if path.is_file() else stat.S_IXGRP), (path, oct(mode))
  return f"{'at once' if at_once else 'one after the other'}: both right"


def packages_of_the_demo(world: World, seconds: float, random: np.random.Generator, directory: pathlib.Path) -> str:
  """Two commands download and unpack packages at once; one may be killed."""
  index, cache = directory / "index", directory / "cache"
  index.mkdir()
  cache.mkdir()
  wheel, requirements = index / "tiny-1.0-py3-none-any.whl", directory / "requirements.txt"
  with zipfile.ZipFile(wheel, "w") as archive:
    archive.writestr("tiny/data.txt", "seven")
    archive.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
    archive.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    archive.writestr("tiny-1.0.dist-info/RECORD", "")
  requirements.write_text(f"tiny==1.0 --hash=sha256:{packages.sha256_of(wheel)}\n")
  offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index)}
  kills = bool(random.random() < 0.5)
  running = [commands.Command(FETCH, cache, requirements, **offline) for _ in range(2)]
  if kills:
    running[0].process.join(random.uniform(0, seconds))
    running[0].process.kill()
  for command in running[kills:]:
    command.succeeded()
  commands.Command(FETCH, cache, requirements, **offline).succeeded()
  return "right beside a killed one" if kills else "both right"


# By name: `(world, seconds of a run, random, directory)` to what happened.
USES: Mapping[str, Callable[..., str]] = {
  "two runs on one output": two_runs_on_one_output,
  "two first uses of a cache": two_first_uses,
  "a damaged cache": damaged_cache,
  "a cache of another version": older_version,
  "no home": no_home,
  "two users": two_users,
  "packages of the demo": packages_of_the_demo,
}


def prepare(shared: pathlib.Path) -> Callable[[np.random.Generator, pathlib.Path], str]:
  world = World(shared)
  seconds = jobs.seconds_of_a_run(world, shared / "timed")
  names = [name for name in USES if name != "two users" or os.geteuid() == 0]

  def trial(random: np.random.Generator, directory: pathlib.Path) -> str:
    name = str(random.choice(names))
    return f"{name}: {USES[name](world, seconds, random, directory)}"

  return trial


def _without(names: Sequence[str], code: str) -> str:
  """The code, after these variables have been taken from the environment."""
  return f"\nimport os\nfor name in {list(names)}:\n  os.environ.pop(name, None)\n{code}"


def _hand_over(directory: pathlib.Path, user: int, group: int) -> None:
  for path in (directory, *directory.rglob("*")):
    os.chown(path, user, group)


PART = Part("Runs, users and versions that meet give right answers or one clear line.", prepare)
