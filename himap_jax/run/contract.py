"""The contract of a row: digests that identify the settings, the question and the pictures of its answer.

A row's `digest` is `<settings>-<question>-<pictures>-<names>`, each the first 16 hexadecimal digits of a SHA-256: of
everything that answers depend on besides the prompts, of the question's text (with the row's own options, if it has
any), of the picture's file (or its address on the web) or, of several, of their digests, and of the pictures' names,
which decide where a file cannot be read. `<output>.settings.json` lists the settings for people; only the digests in
the rows decide whether a run may resume.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from checkpoints_convert.json_files import read_json, write_json
from himap_jax.errors import UserError
from himap_jax.pruning.schedule import Schedule
from himap_jax.run import sources
from himap_jax.run.command import differences
from himap_jax.run.pictures import PictureFiles
from himap_jax.run.progress import Progress
from himap_jax.run.prompts import Prompt, Prompts
from himap_jax.run.records import is_label
from himap_jax.run.user_errors import user_error

_DIGITS = 16
_REMEMBERED = 1 << 16  # digests of pictures that have names, which several rows may share


def digest_of(settings: Mapping[str, Any]) -> str:
  """The settings part of a row's digest."""
  return _hex(json.dumps(settings, sort_keys=True))


def schedule_settings(schedule: Schedule) -> dict[str, Any]:
  """What answers depend on of a schedule besides its method."""
  return {
    "prune_layers": [*schedule.frozen_layers, *(stage.layer for stage in schedule.stages)],
    "keep": [stage.keep for stage in schedule.stages],
    "method_parameters": dict(schedule.parameters),
    "restore": schedule.restore,
    "keep_positions": schedule.keep_positions,
  }


@dataclasses.dataclass(frozen=True)
class Contract:
  """What the rows of an output must match.

  Attributes:
    settings: everything that answers depend on besides the prompts, as JSON values.
    prompts: all prompts, the same in every process.
    files: reads the pictures.
    advice: what to do about rows made with other settings.
  """

  output: pathlib.Path
  settings: Mapping[str, Any]
  prompts: Prompts
  files: PictureFiles = PictureFiles()
  advice: str = "use another --output, or --noresume to replace it"

  @functools.cached_property
  def digest(self) -> str:
    return digest_of(self.settings)

  def row_digest(self, prompt: Prompt, pictures: Sequence[str] | None = None) -> str:
    """A row's digest; `pictures` are the pictures' digests, None if they were not read."""
    return f"{self.digest}-{_hex(prompt.asked)}-{_joint(pictures)}-{_names(prompt.images)}"

  def write_settings(self) -> None:
    """Writes the settings beside the output; raises UserError if that fails."""
    with user_error(f"cannot write {self._settings_path}"):
      write_json(self._settings_path, {"digest": self.digest, **self.settings})

  def differences(self, digest: str) -> str:
    """Settings that have changed since a digest, in parentheses; empty if the earlier settings are unknown."""
    try:
      before = read_json(self._settings_path)
    except ValueError:
      return ""
    before.pop("digest", None)
    return f" ({differences(before, self.settings)})" if digest_of(before) == digest else ""

  @property
  def _settings_path(self) -> pathlib.Path:
    return self.output.with_name(f"{self.output.name}.settings.json")


class Comparison:
  """Compares the rows of an output with a contract: each row as it is read, then their questions and pictures.

  Holds some seventy bytes for every prompt; no question and no picture stays.
  """

  def __init__(self, contract: Contract):
    self._contract = contract
    self._position = {key: position for position, key in enumerate(contract.prompts.keys)}
    self._digests = np.zeros(len(contract.prompts), f"S{3 * _DIGITS + 2}")  # all but the settings
    self._has_row = np.zeros(len(contract.prompts), bool)
    self._unreadable: set[str | bytes] = set()
    self._digest_of_name = functools.lru_cache(_REMEMBERED)(contract.files.digest)

  def is_failed(self, row: Mapping[str, Any]) -> bool:
    """Whether a row is the error of a prompt, which is answered again, or of a row that could not be read.

    Raises:
      UserError: the row would be kept, but was made with other settings.
    """
    position, contract = self._position.get(str(row["id"])), self._contract
    if row["error"] is not None and (position is not None or is_label(str(row["id"]))):
      return True
    settings, _, rest = row["digest"].partition("-")
    if settings != contract.digest:
      changed = contract.differences(settings)
      raise UserError(f"{contract.output}: made with other settings{changed}; {contract.advice}")
    if position is not None:
      self._digests[position], self._has_row[position] = rest.encode(), True
    return False

  def changed(self) -> set[str]:
    """Ids of the rows so far whose question or a picture has changed; reads the prompts of rows once.

    A picture that cannot be read counts as unchanged if it has the same name, so that a missing disk loses no answers;
    see `num_unreadable`. One on the web is compared by its address.
    """
    prompts, changed = self._contract.prompts, set()
    positions = np.flatnonzero(self._has_row).tolist()
    with Progress(len(positions), "row", "comparing with the output") as progress:
      for position, prompt in zip(positions, prompts.where(self._has_row), strict=True):
        if self._is_changed(prompt, self._digests[position].decode(errors="replace")):
          changed.add(prompts.keys[position])
        progress.update()
    return changed

  @property
  def num_unreadable(self) -> int:
    """Number of pictures that could not be read for comparison, of rows that count as unchanged."""
    return len(self._unreadable)

  def _is_changed(self, prompt: Prompt, digests: str) -> bool:
    question, pictures, names = (*digests.split("-"), "", "")[:3]
    if question != _hex(prompt.asked):
      return True
    digest = self._contract.files.digest
    now = [self._digest_of_name(image) if sources.is_name(image) else digest(image) for image in prompt.images]
    if None not in now:
      return pictures != _joint(now)
    if names != _names(prompt.images):
      return True
    self._unreadable.update(image for image, own in zip(prompt.images, now, strict=True) if own is None)
    return False


def _joint(pictures: Sequence[str] | None) -> str:
  if pictures is None:
    return "0" * _DIGITS
  return pictures[0][:_DIGITS] if len(pictures) == 1 else _hex(",".join(pictures))


def _names(images: Sequence[str | bytes]) -> str:
  """A digest of the pictures' names, or of the texts that hold them; bytes, which can always be read, have none."""
  return _hex(json.dumps([None if isinstance(image, bytes) else image for image in images]))


def _hex(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]
