"""Provenance of measurements: the processor, the code and package versions."""

import hashlib
import os
import pathlib
import platform
from collections.abc import Iterable
from importlib import metadata

import himap_jax
from himap_jax.errors import UserError


def processor() -> str:
  """The processor's name and the number of cores available to the process."""
  lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
  return f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else platform.machine()}"


def checksum_of_library(others: Iterable[pathlib.Path]) -> str:
  """Checksum of the library's and other files; measurements of different code do not belong in one table."""
  library = pathlib.Path(himap_jax.__file__).parent.rglob("*.py")
  return hashlib.sha256(b"".join(path.read_bytes() for path in (*sorted(library), *sorted(others)))).hexdigest()[:16]


def versions(*packages: str) -> dict[str, str]:
  """Installed versions of packages; raises `UserError` if one is missing."""
  try:
    return {name: metadata.version(name) for name in packages}
  except metadata.PackageNotFoundError as error:
    raise UserError(f"this needs {error.name}, which is not installed; --help names what to install") from error
