"""The contract of a row: digests that identify the settings, the question and the pictures of its answer.

A row's `digest` is `<settings>-<question>-<pictures>`, each the first 16 hexadecimal digits of a SHA-256: of everything
that answers depend on besides the prompts, of the question's text, and of the picture's file or, of several, of their
digests. `<output>.settings.json`
lists the settings for people; only the digests in the rows decide whether a run may resume.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from checkpoints_convert.source import read_json, write_json
from himap_jax.errors import UserError
from himap_jax.run import sources
from himap_jax.run.command import differences, user_error
from himap_jax.run.pictures import PictureFiles
from himap_jax.run.prompts import Prompt

_DIGITS = 16


def digest_of(settings: Mapping[str, Any]) -> str:
  """The settings part of a row's digest."""
  return _hex(json.dumps(settings, sort_keys=True))


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
  prompts: Sequence[Prompt]
  files: PictureFiles = PictureFiles()
  advice: str = "use another --output, or --noresume to replace it"
  _pictures: dict[str, str | None] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

  @functools.cached_property
  def digest(self) -> str:
    return digest_of(self.settings)

  def row_digest(self, prompt: Prompt, pictures: Sequence[str] | None = None) -> str:
    """A row's digest; `pictures` are the SHA-256 of the pictures' files, None if they were not read."""
    return f"{self.digest}-{_hex(prompt.question_text)}-{_joint(pictures)}"

  def is_stale(self, row: Mapping[str, Any]) -> bool:
    """Whether a row's prompt must be answered again: the row is an error, or its question or a picture has changed.

    A picture that cannot be read counts as unchanged, so that a missing disk loses no answers; see `unreadable`. So does
    one on the web.

    Raises:
      UserError: the row would be kept, but was made with other settings.
    """
    prompt = self._by_key.get(str(row["id"]))
    if prompt is not None and row["error"] is not None:
      return True
    settings, question, pictures = (row["digest"].split("-") + [""] * 3)[:3]
    if settings != self.digest:
      raise UserError(f"{self.output}: made with other settings{self._differences(settings)}; {self.advice}")
    if prompt is None or question != _hex(prompt.question_text):
      return prompt is not None
    for image in prompt.images:
      if image not in self._pictures:
        self._pictures[image] = None if sources.is_url(image) else self.files.digest(image)
    now = [self._pictures[image] for image in prompt.images]
    return None not in now and pictures != _joint(now)

  @property
  def unreadable(self) -> int:
    """Number of answered rows' pictures that could not be read for comparison."""
    return sum(digest is None and not sources.is_url(image) for image, digest in self._pictures.items())

  def write_settings(self) -> None:
    """Writes the settings beside the output; raises UserError if that fails."""
    with user_error(f"cannot write {self._settings_path}"):
      write_json(self._settings_path, {"digest": self.digest, **self.settings})

  @property
  def _settings_path(self) -> pathlib.Path:
    return self.output.with_name(f"{self.output.name}.settings.json")

  @functools.cached_property
  def _by_key(self) -> dict[str, Prompt]:
    return {prompt.key: prompt for prompt in self.prompts}

  def _differences(self, digest: str) -> str:
    """Settings that have changed since a digest, in parentheses; empty if the earlier settings are unknown."""
    try:
      before = read_json(self._settings_path)
    except ValueError:
      return ""
    before.pop("digest", None)
    return f" ({differences(before, self.settings)})" if digest_of(before) == digest else ""


def _joint(pictures: Sequence[str] | None) -> str:
  if pictures is None:
    return "0" * _DIGITS
  return pictures[0][:_DIGITS] if len(pictures) == 1 else _hex(",".join(pictures))


def _hex(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]
