"""What measured figures belong to: the processor, and the code."""

import hashlib
import os
import pathlib
import platform
from collections.abc import Iterable

import himap_jax


def processor() -> str:
  """The processor's name and how many of its cores the process has."""
  lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
  return f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else platform.machine()}"


def checksum_of_library(others: Iterable[pathlib.Path]) -> str:
  """Of the library's files and of others: figures of other code do not belong into the same table."""
  library = pathlib.Path(himap_jax.__file__).parent.rglob("*.py")
  return hashlib.sha256(b"".join(path.read_bytes() for path in (*sorted(library), *sorted(others)))).hexdigest()[:16]
