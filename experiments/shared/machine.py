"""What figures of a machine belong to: its processor, the code, and the directories of a measuring command."""

import hashlib
import os
import pathlib
import platform
import sys
from collections.abc import Collection, Iterable
from importlib import metadata
from typing import Any

import himap_jax
from experiments.shared import study
from experiments.shared.study import Report
from himap_jax.errors import UserError
from himap_jax.run import command


def processor() -> str:
  """The processor's name and how many of its cores the process has."""
  lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
  return f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else platform.machine()}"


def checksum_of_library(others: Iterable[pathlib.Path]) -> str:
  """Checksum of the library's files and of others: figures of other code do not belong into the same table."""
  library = pathlib.Path(himap_jax.__file__).parent.rglob("*.py")
  return hashlib.sha256(b"".join(path.read_bytes() for path in (*sorted(library), *sorted(others)))).hexdigest()[:16]


def versions(*packages: str) -> dict[str, str]:
  """The installed version of each package; raises `UserError` where one is missing."""
  try:
    return {name: metadata.version(name) for name in packages}
  except metadata.PackageNotFoundError as error:
    raise UserError(f"this needs {error.name}, which is not installed; --help names what to install") from error


def chosen(flag: Any, known: Collection[str]) -> list[str]:
  """The names in a list flag; raises `UserError` where one is not known."""
  for name in flag.value:
    if name not in known:
      raise UserError(f"--{flag.name}: unknown {name!r}; known: {', '.join(known)}")
  return flag.value


def open_workdir(**settings: Any) -> pathlib.Path:
  """The directory that `--workdir` names, for measurements that depend on these settings.

  Raises:
    UserError: it was begun with other settings, or it cannot be created.
  """
  workdir = study.directory("workdir").absolute()
  command.check_settings(workdir / "settings.json", settings, "use another --workdir")
  return workdir


def write(report: Report, name: str) -> str:
  """Writes a command's report into the directory that `--output` names, and returns its text."""
  return report.write(study.directory("output"), name, " ".join([f"python -m experiments.{name}", *sys.argv[1:]]))
