"""What makes an output row the answer to a prompt: every row says by digests with which settings and on what it was
made.

A row's `digest` is `<settings>-<question>-<picture>`, 16 hexadecimal digits each of the SHA-256 of everything that
answers depend on beside the prompts, of the question's text, and of the picture's file. The file
`<output>.settings.json` spells the settings out for people; only the rows decide whether a run may go on from them.
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
from himap_jax.run.command import differences, user_error
from himap_jax.run.pictures import file_digest
from himap_jax.run.prompts import Prompt

_DIGITS = 16


def digest_of(settings: Mapping[str, Any]) -> str:
  """The first part of the digest of rows that are made with these settings."""
  return _hex(json.dumps(settings, sort_keys=True))


@dataclasses.dataclass(frozen=True)
class Contract:
  """What the rows of an output have to match.

  Attributes:
    output: the output file.
    settings: everything that answers depend on beside the prompts, as JSON can hold it.
    prompts: all prompts, the same in every process.
    image_dir: where relative paths of images begin.
    advice: what to do about rows that were made with other settings.
  """

  output: pathlib.Path
  settings: Mapping[str, Any]
  prompts: Sequence[Prompt]
  image_dir: pathlib.Path = pathlib.Path()
  advice: str = "use another --output, or --noresume to replace it"
  _pictures: dict[str, str | None] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

  @functools.cached_property
  def digest(self) -> str:
    """The first part of every row's digest."""
    return digest_of(self.settings)

  def row_digest(self, prompt: Prompt, picture: str | None = None) -> str:
    """A row's digest; `picture` is the SHA-256 of the picture's file, or None where it was not read."""
    return f"{self.digest}-{_hex(prompt.question)}-{_shortened(picture)}"

  def is_stale(self, row: Mapping[str, Any]) -> bool:
    """Whether a row's prompt is to be answered again: the row is an error, or its question or picture has changed.

    A picture that cannot be read now counts as unchanged, so that no answer is lost to a disk that is not there; see
    `unreadable`.

    Raises:
      UserError: the row would stay, and was made with other settings.
    """
    prompt = self._by_key.get(str(row["id"]))
    if prompt is not None and row["error"] is not None:
      return True
    settings, question, picture = (row["digest"].split("-") + [""] * 3)[:3]
    if settings != self.digest:
      raise UserError(f"{self.output}: begun with other settings{self._differences(settings)}; {self.advice}")
    if prompt is None or question != _hex(prompt.question):
      return prompt is not None
    if prompt.image not in self._pictures:
      self._pictures[prompt.image] = file_digest(self.image_dir / prompt.image)
    now = self._pictures[prompt.image]
    return now is not None and picture != _shortened(now)

  @property
  def unreadable(self) -> int:
    """How many pictures of answered rows could not be compared with those that were answered."""
    return sum(digest is None for digest in self._pictures.values())

  def write_settings(self) -> None:
    """Writes the settings beside the output; UserError where they cannot be written."""
    with user_error(f"cannot write {self._settings_path}"):
      write_json(self._settings_path, {"digest": self.digest, **self.settings})

  @property
  def _settings_path(self) -> pathlib.Path:
    return self.output.with_name(f"{self.output.name}.settings.json")

  @functools.cached_property
  def _by_key(self) -> dict[str, Prompt]:
    return {prompt.key: prompt for prompt in self.prompts}

  def _differences(self, digest: str) -> str:
    """What has changed since rows of a digest were made, in parentheses; nothing where the settings are not known."""
    try:
      before = read_json(self._settings_path)
    except ValueError:
      return ""
    before.pop("digest", None)
    return f" ({differences(before, self.settings)})" if digest_of(before) == digest else ""


def _hex(text: str) -> str:
  return _shortened(hashlib.sha256(text.encode()).hexdigest())


def _shortened(digest: str | None) -> str:
  return (digest or "0" * _DIGITS)[:_DIGITS]
